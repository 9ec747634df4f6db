"""Record each sync for people: files in a directory, and metrics.

The session calls its observers after each push; nothing here touches a tensor or a worker.
"""
