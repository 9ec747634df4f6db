"""`qerl-sync bench`: syncs beside what the machine can do, each measurement with its target.

Uses the library as a user does.
"""
