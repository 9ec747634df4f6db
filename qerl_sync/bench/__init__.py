"""Measurements that users can repeat; each also checks what it measured."""
