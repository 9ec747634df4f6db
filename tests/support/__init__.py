"""Shared by the tests: tiny models with real architectures, real engines, fingerprints."""
