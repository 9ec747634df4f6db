"""The control plane of vLLM engines, as a trainer drives it."""
