"""Gloo between two processes, with its gaps closed: who may connect, what errors mean, hanging up.

The default process group, if there is one, is left alone. Gloo is given the one address that the
two sides already talk over, and its own addresses travel over that authenticated channel: there is
no store that a stranger could read or write, and nothing listens on other interfaces.
"""

from __future__ import annotations

import hmac
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

from qerl_sync.errors import (
    AgreementError,
    PeerLostError,
    SyncError,
    TransportError,
    TransportTimeout,
)
from qerl_sync.wire.channel import Channel

ROLES = ("trainer", "worker")
TRAINER, WORKER = range(2)
# Tags from 0 up are for those who use the pair.
_HANG_UP_TAG, _PROOF_TAG = 2**31 - 1, 2**31 - 2
MAX_TAG = 2**31 - 3


class GlooPair:
    """Two processes. Operations of one tag and direction meet in the order of posting.

    A tensor must live until its operation has been waited for, and both sides must think of the
    same number of bytes: Gloo ends the process that gets more than it has room for.

    Args:
        channel: to the other side; not used after the constructor.
        rank: TRAINER or WORKER.
        timeout_seconds: the longest that a single wait may take.

    Attributes:
        key: that both sides know, and nobody else.

    Raises:
        PeerLostError, TransportTimeout: the other side does not make its half.
        AgreementError: a third party has connected to Gloo.
    """

    def __init__(self, channel: Channel, rank: int, timeout_seconds: float) -> None:
        self._peer = 1 - rank
        self._timeout_seconds = timeout_seconds
        self._failure: SyncError | None = None
        key = self.key = channel.derive("gloo")
        self._group: Any = _connected_group(channel, rank, timeout_seconds)
        self._prove(key, rank)

    @property
    def peer(self) -> str:
        return ROLES[self._peer]

    def send(self, tensor: torch.Tensor, tag: int) -> Any:
        """Start to send contiguous bytes. Returns what `wait` takes."""
        return self._post("send", tensor, tag)

    def receive(self, tensor: torch.Tensor, tag: int) -> Any:
        """Start to receive contiguous bytes. Returns what `wait` takes."""
        return self._post("recv", tensor, tag)

    def wait(self, work: Any, what: str) -> None:
        """Until the operation is done.

        A receive that nothing has arrived of ends at once when the other side dies or either side
        hangs up. Gloo forgets to tell those that are in their middle: wait for what comes after.

        Raises:
            TransportTimeout: it took longer than it may; the pair is closed.
            PeerLostError: the other side hung up or died.
            TransportError: this side hung up.
        """
        started = time.monotonic()
        try:
            self._raise_failure(what)
            work.wait(timedelta(seconds=self._timeout_seconds))
        except RuntimeError as exc:
            self._raise_failure(what, exc)
            raise self.fail(self._error(exc, what, time.monotonic() - started)) from exc

    def fail(self, error: SyncError) -> SyncError:
        """Hang up because of an error, which later calls name. Returns it."""
        if self._failure is None:
            self._failure = error
            # Gloo has no call that ends a connection. A wait that runs out of time does.
            with suppress(RuntimeError):
                nothing = torch.empty(1, dtype=torch.uint8)
                work = self._group.recv([nothing], self._peer, _HANG_UP_TAG)
                work.wait(timedelta(milliseconds=1))
            self._group = None
        return error

    def close(self) -> None:
        """Hang up. Waits of both sides, in whatever thread, end."""
        self.fail(TransportError("the link was closed"))

    def _post(self, kind: str, tensor: torch.Tensor, tag: int) -> Any:
        what = f"starting to {kind} {tensor.nbytes:,} bytes"
        group = self._group
        self._raise_failure(what)
        try:
            return getattr(group, kind)([tensor], self._peer, tag)
        except RuntimeError as exc:
            self._raise_failure(what, exc)
            raise self.fail(self._error(exc, what, 0.0)) from exc

    def _raise_failure(self, what: str, cause: Exception | None = None) -> None:
        """The first error ends the pair; what comes after is its consequence."""
        if self._failure is not None:
            raise type(self._failure)(f"{what}: {self._failure}") from cause

    def _error(self, exc: RuntimeError, what: str, seconds: float) -> TransportError:
        if "Timed out" in str(exc):  # nothing but the text of Gloo's errors tells them apart
            return TransportTimeout(
                f"{what}: the {self.peer} did not answer within {seconds:.1f} s; it is stopped, "
                "overloaded or cut off. Look at its log, or raise sync.timeout_seconds"
            )
        return PeerLostError(
            f"{what}: the {self.peer} closed the connection or died; look at its log"
        )

    def _prove(self, key: bytes, rank: int) -> None:
        """Show over Gloo itself who is there: strangers may have been quicker to connect to it."""
        ours, theirs = (hmac.digest(key, ROLES[r].encode(), "sha256") for r in (rank, self._peer))
        proof, answer = torch.tensor(list(ours)).byte(), torch.zeros(len(theirs)).byte()
        sent, received = self.send(proof, _PROOF_TAG), self.receive(answer, _PROOF_TAG)
        self.wait(received, f"proof of the {self.peer}")
        self.wait(sent, "own proof")
        if not hmac.compare_digest(bytes(answer.tolist()), theirs):
            raise self.fail(
                AgreementError(
                    f"who connected to Gloo is not the {self.peer}; see who else can reach "
                    "this address, and try again"
                )
            )


class _Addresses(Store):
    """What Gloo tells and asks before it connects: one address in each direction."""

    def __init__(self, channel: Channel, timeout_seconds: float) -> None:
        super().__init__()
        self._channel, self._timeout_seconds = channel, timeout_seconds
        self._known: dict[str, bytes] = {}

    def set(self, key: str, value: Any) -> None:
        self._known[key] = bytes(value)
        frame = key.encode() + b"\0" + self._known[key]
        self._channel.send_bytes(frame, self._timeout_seconds, "sending Gloo's address")

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        while not self._known.keys() >= set(keys):
            frame = self._channel.receive_bytes(self._timeout_seconds, "waiting for Gloo's address")
            key, _, value = frame.partition(b"\0")
            self._known[key.decode()] = value

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._known[key]


def _connected_group(channel: Channel, rank: int, timeout_seconds: float) -> ProcessGroupGloo:
    host = channel.local_host
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._threads = 1
    options._timeout = timedelta(seconds=timeout_seconds)
    try:
        options._devices = [ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
        return ProcessGroupGloo(_Addresses(channel, timeout_seconds), rank, 2, options)
    except RuntimeError as exc:
        raise TransportError(
            f"Gloo cannot connect the {ROLES[rank]} at {host} to the other side ({exc}); each side "
            "must be able to open connections to the other's free ports"
        ) from exc
