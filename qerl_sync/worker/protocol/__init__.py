"""The worker's end of a connection, and the vLLM engine classes that lend it their thread.

Knows of the model only what `load` offers.
"""
