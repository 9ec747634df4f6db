"""Account for the memory that a sync holds: device tensors, the ledger, the trace.

This package decides nothing. The ledger and the trace need no torch.
"""
