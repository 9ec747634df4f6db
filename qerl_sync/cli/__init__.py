"""The commands, one file or folder each: arguments in, text and status out.

No work is done here that a library user would miss.
"""
