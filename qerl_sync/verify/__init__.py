"""Verify that a sync is right. This package only checks: it does not send, load or plan."""
