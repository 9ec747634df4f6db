"""Weights as files in a directory or an object store, written by a trainer and read by engines.

For clusters that no connection leads to: the trainer's publishes, each of the others reads and
syncs its own workers.
"""
