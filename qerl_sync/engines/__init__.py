"""The control plane of a vLLM engine: pause, update, reset caches, resume. One file for each kind
of engine.

No tensor passes here, and nothing is known of plans.
"""
