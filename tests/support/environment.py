"""The environment of tests and benchmarks, set before vLLM is imported anywhere: in-process
engines, a small KV cache, no core pinning, no network, an interrupt that children hear."""

from __future__ import annotations

import os
import signal

# Shells start what runs in the background with interrupts ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Servers that are asked without showing it would refuse.
os.environ.pop("QERL_SYNC_TOKEN", None)

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray gives its workers a niceness of 15: beside other groups of tests they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")
