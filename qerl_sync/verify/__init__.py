"""What proves that a sync is right: finite values, checksums, changes, aliased memory, a prompt's
log-probabilities.

Checks only: nothing here sends, loads or plans.
"""
