"""The ways into TRL, Ray and vLLM's trainer contract.

Whatever patches or subclasses these libraries, and nothing else.
"""
