"""What a sync holds in memory: the detector of device tensors, the ledger, the trace.

Accounts only: it decides nothing, and the ledger and the trace need no torch.
"""
