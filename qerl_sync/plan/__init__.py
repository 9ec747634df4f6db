"""The plan as a value: layer map, order, chunks, predicted trace. Standard library only.

No tensor, no device, no vLLM may enter.
"""
