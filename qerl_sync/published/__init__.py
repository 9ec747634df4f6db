"""Weights as files in a directory or an object store: who writes them, and who reads them.

For clusters that no connection leads to: the trainer's publishes, each of the others reads and
syncs its own workers.
"""
