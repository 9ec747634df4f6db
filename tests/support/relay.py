"""Something between trainer and workers, as a router, a firewall or an attacker is."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress

# Loopback too, and another address than the trainer's.
HOST = "127.0.0.2"


class Relay:
    """Listens at HOST and a port, and passes connections on to the same port of 127.0.0.1.

    Attributes:
        to_trainer, to_worker: change what passes in that direction.
        forgotten: connections that exist now pass nothing any more and stay open, as where a NAT
            has forgotten them. New ones pass.
    """

    def __init__(self, port: int) -> None:
        self.to_trainer: Callable[[bytes], bytes] = bytes
        self.to_worker: Callable[[bytes], bytes] = bytes
        self._port = port
        self._ends: list[socket.socket] = []
        self._forgotten: set[socket.socket] = set()
        self._server = socket.create_server((HOST, port))
        threading.Thread(target=self._listen, daemon=True).start()

    def forget(self) -> None:
        self._forgotten = set(self._ends)

    def close(self) -> None:
        for end in (self._server, *self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                worker = self._server.accept()[0]
                trainer = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [worker, trainer]
                for one, other, name in (
                    (worker, trainer, "to_trainer"),
                    (trainer, worker, "to_worker"),
                ):
                    threading.Thread(
                        target=self._pass, args=(one, other, name), daemon=True
                    ).start()

    def _pass(self, one: socket.socket, other: socket.socket, name: str) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 16):
                if one not in self._forgotten:
                    other.sendall(getattr(self, name)(data))
            if one not in self._forgotten:
                other.shutdown(socket.SHUT_WR)
