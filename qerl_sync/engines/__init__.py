"""Control planes of vLLM engines: pause, update, reset caches, resume. One file for each kind.

No tensor passes through these clients, and they know nothing of plans.
"""
