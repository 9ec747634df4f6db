"""Verify that a sync is right: finite values, checksums, changes, aliased memory, a prompt's
log-probabilities.

This package only checks: it does not send, load or plan.
"""
