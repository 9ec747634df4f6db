"""`scripts/faults`: break syncs of real engines on purpose, and judge what is left."""
