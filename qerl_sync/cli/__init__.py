"""The commands, one file or folder each: arguments in, text and exit status out.

The commands only call the library.
"""
