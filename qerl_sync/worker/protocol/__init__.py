"""The worker's end of a connection, and the vLLM engine classes whose calls it runs in.

Knows of the model only what `load` offers.
"""
