"""The only code that touches vLLM's internals. It probes by feature, and names what is missing.

No decision about a sync is made here.
"""
