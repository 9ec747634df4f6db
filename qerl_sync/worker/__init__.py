"""What runs beside the vLLM model: probe, monitor, receiver. `compat` alone touches vLLM's insides."""
