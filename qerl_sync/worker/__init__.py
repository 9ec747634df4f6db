"""What runs beside the vLLM model. `compat` and its siblings alone touch vLLM's insides."""
