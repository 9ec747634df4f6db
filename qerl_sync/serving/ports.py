"""Reserve TCP ports for servers that are about to listen."""

from __future__ import annotations

import errno
import socket

from qerl_sync.errors import ConfigError


def reserve_port(host: str, port: int | None) -> socket.socket:
    """Return a socket bound to that port, or to a free one if it is None or 0.

    While the socket is open no other program gets the port by chance. A server can still listen on
    it, as it does not listen itself.

    Raises:
        ConfigError: another program listens there, or there is no such address on this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host or None, port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"there is no address {host} port {port}: {exc}") from exc
    reserved = socket.socket(family, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind(address)
    except (OSError, OverflowError) as exc:
        reserved.close()
        if getattr(exc, "errno", None) == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} on {host} is in use; stop the program that listens there (`ss "
                "-ltnp` names it), or choose another port"
            ) from exc
        raise ConfigError(f"cannot listen on {host} port {port}: {exc}") from exc
    return reserved


def port_of(reserved: socket.socket) -> int:
    return int(reserved.getsockname()[1])
