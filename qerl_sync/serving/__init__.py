"""vLLM servers that we start ourselves."""
