"""What both sides of a connection share: channels, shared memory, process groups."""
