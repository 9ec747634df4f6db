"""The layer map of a model that no engine runs: vLLM's own class, built on the meta device in a
process of its own.

Needs no weights and no accelerator, and touches no live engine.
"""
