"""`qerl-sync train`: a run from its YAML to its report.

Uses the callback like any user; a sync knows nothing of a run.
"""
