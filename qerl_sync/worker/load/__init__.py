"""Loads a planned stream into one live vLLM model, measures it, and poisons, rolls back or commits.

Knows no trainer and no connection: tensors come in as an iterator.
"""
