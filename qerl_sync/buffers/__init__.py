"""What a sync holds in memory: the trace, the ledger that keeps it, the detector of what counts."""
