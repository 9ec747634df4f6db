"""`qerl-sync train`: a run from its YAML to its report.

This package uses the callback as any user does. A sync knows nothing of a run.
"""
