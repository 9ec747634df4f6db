"""Ports for tests that must name one before it is bound."""

from __future__ import annotations

import random
import socket

# Below those that Linux gives to programs that name none (net.ipv4.ip_local_port_range), which
# tests that run beside would take in between.
PORTS = range(15_000, 30_000)


def free_port() -> int:
    """Return a port of the loopback on which nobody listens."""
    for port in random.SystemRandom().sample(PORTS, 100):  # other seeds than in a process beside
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise AssertionError(f"all of 100 ports of {PORTS} are in use")
