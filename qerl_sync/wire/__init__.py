"""Code that both ends of a connection share: authenticated frames, messages, shared memory.

Neither trainer nor worker code may enter.
"""
