"""The way from a session to the workers: in this process, to one engine, to a pool.

A transport moves what a plan says; it gathers nothing and verifies nothing of its own.
"""
