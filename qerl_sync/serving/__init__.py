"""vLLM servers that we start: command, process, guard, and the middleware in front of their routes.

Not how weights travel.
"""
