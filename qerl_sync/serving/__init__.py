"""Start vLLM servers: command, process, guard, and the middleware in front of their routes.

Weights do not pass through this package.
"""
