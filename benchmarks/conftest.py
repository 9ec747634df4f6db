"""Benchmarks use the tests' environment and their `support` package."""

import support.environment  # noqa: F401
