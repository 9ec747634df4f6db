"""Where workers connect to: who is expected, and who is turned away."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from qerl_sync.engines.base import EngineCall
from qerl_sync.errors import AgreementError, TransportError, TransportTimeout
from qerl_sync.transports.remote.compatibility import require_alike, require_complete
from qerl_sync.transports.remote.control import GRACE_SECONDS
from qerl_sync.transports.remote.peer import Peer
from qerl_sync.wire.channel import Listener, format_endpoint


class WorkerListener:
    """One trainer rank's listener.

    Args:
        address: under which workers reach it.
        port: to listen at; 0 is any free one.
        bind: the address to listen on, and on no other.
        num_workers: how many to wait for where no call of the engine says when all are there.
    """

    def __init__(
        self,
        address: str,
        port: int,
        token: str,
        *,
        bind: str,
        timeout_seconds: float,
        num_workers: int,
    ) -> None:
        self._listener = Listener(bind, port, token)
        self._timeout_seconds = timeout_seconds
        self._num_workers = num_workers
        self.endpoint = format_endpoint(address, self._listener.port)

    def admit(
        self,
        call: EngineCall | None,
        greet: Callable[[Peer], None],
        world_size: Callable[[], int | None],
    ) -> list[Peer]:
        """Greet workers until all are there, all alike.

        Args:
            call: the engine's, which returns when all its workers have been greeted.
            world_size: returns how many workers the engine has; None if nobody knows.

        Raises:
            SyncError: of any kind; nobody is connected then.
        """
        peers: list[Peer] = []
        try:
            self._admit(call, greet, peers)
            hellos = [peer.hello for peer in peers]
            require_complete(hellos, world_size())
            require_alike(hellos)
        except BaseException:
            for peer in peers:
                peer.close()
            self._reject(call)
            raise
        return peers

    def reject(self) -> None:
        """Workers that have come since the last `admit`, too late for it."""
        while (late := self._listener.accept(0.0)) is not None:
            late.close()

    def close(self) -> None:
        self._listener.close()

    def _admit(
        self, call: EngineCall | None, greet: Callable[[Peer], None], peers: list[Peer]
    ) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            complete = self._complete(call, peers)
            if complete and call is None:
                break
            # What has connected before the engine's call ended may say why the call has failed.
            channel = self._listener.accept(0.0 if complete else 0.05)
            if channel is not None:
                peer = Peer(channel, self._timeout_seconds)
                _forget_lost(peers, peer)
                peers.append(peer)
                greet(peer)
            elif complete:
                break
            elif time.monotonic() > deadline:
                raise TransportTimeout(
                    f"{len(peers)} workers connected to the trainer within "
                    f"{self._timeout_seconds:.0f} s, and the engine still waits for others; look "
                    "at its log, or raise sync.timeout_seconds"
                )
        if call is not None:
            call.raise_if_failed()
            if not peers:
                raise TransportError(
                    "the engine answered and none of its workers connected; was it started with "
                    'weight_transfer_config={"backend": "qerl"}?'
                )

    def _complete(self, call: EngineCall | None, peers: Sequence[Peer]) -> bool:
        return len(peers) >= self._num_workers if call is None else call.done

    def _reject(self, call: EngineCall | None) -> None:
        """Workers that come while the engine gives up: the next call must not meet them."""
        deadline = time.monotonic() + GRACE_SECONDS
        coming = call is not None
        while coming:
            coming = call is not None and not call.done and time.monotonic() < deadline
            while (late := self._listener.accept(0.05)) is not None:
                late.close()


def _forget_lost(peers: list[Peer], new: Peer) -> None:
    """Drop the connection that `new` replaces: its own earlier one, or that of a worker that died.

    Raises AgreementError if another process, whose connection is open, claims the same place.
    """
    for old in list(peers):
        if old.hello.place != new.hello.place:
            continue
        if old.hello.process != new.hello.process and old.connected:
            # To drop one of two live workers would leave it on its old weights, unnoticed.
            new.close()
            raise AgreementError(
                f"{old.name} and {new.name} claim the same place in the engine; start each engine "
                "in processes of its own, and sync them in sessions of their own"
            )
        old.close()
        peers.remove(old)
