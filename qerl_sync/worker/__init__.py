"""Everything that runs beside the vLLM model, in the worker's process.

`load` fills the model, `protocol` talks to the trainer, `compat` touches vLLM's internals.
"""
