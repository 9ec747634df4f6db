"""Which architectures survive a sync: ours beside vLLM's own reload (`scripts/conformance`)."""
