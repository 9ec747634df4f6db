"""What is left of each sync for people: records in a directory, and metrics.

The session calls its observers after each push; nothing here touches a tensor or a worker.
"""
