"""Trainers and vLLM engines as Ray actors, and the sync between them."""
