"""Tensors between one trainer rank and one worker, over a Gloo process group of their own.

    trainer                                     worker
    GlooLink.listen: a port  ---- (told) ---->  GlooLink.connect
    <------- a channel on which both prove the secret and swap Gloo's addresses ------->
    <======= Gloo, on which both prove it again; the channel and its port close =======>
    send: payloads, length and tag        --->  receive
                                          <---  receipt

The authentication tag is that of the payloads, where the link is sealed: who can write to the
network between the two could else change weights unseen. Length and receipt make up for two traits
of Gloo. It leaves whoever waits for a transfer that is in its middle waiting when the other side
dies, so both sides wait for what comes after the payloads. And a payload larger than the buffer
that waits for it ends the process (`std::terminate`, no exception), so payloads of different
lengths have different (Gloo's) tags: they never meet.

A payload of 16 MiB is as quick as raw TCP; each transfer costs about 0.2 ms besides: pack small
tensors.
"""

from __future__ import annotations

import hmac
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, TypeVar

import torch
from typing_extensions import Self

from qerl_sync.errors import AgreementError, IntegrityError, TransportError, TransportTimeout
from qerl_sync.wire.channel import Listener, connect, format_endpoint
from qerl_sync.wire.gloo_pair import MAX_TAG, ROLES, TRAINER, WORKER, GlooPair
from qerl_sync.wire.tags import TAG_BYTES, Tags

TransferT = TypeVar("TransferT", bound="Transfer")

_LENGTH_TAG, _RECEIPT_TAG, _FIRST_PAYLOAD_TAG = range(3)
_LENGTH_BYTES = 8


class GlooLink:
    """A pair of processes. One thread may send while another receives; any may close.

    Receives meet sends in the order of both. After an error the link is of no use.
    """

    def __init__(self, pair: GlooPair, rank: int, *, sealed: bool) -> None:
        self._pair = pair
        self._transfers: list[Transfer] = []
        self._own_tags = Tags(pair.key, ROLES[rank]) if sealed else None
        self._other_tags = Tags(pair.key, ROLES[1 - rank]) if sealed else None

    @classmethod
    def listen(
        cls, host: str, secret: str, timeout_seconds: float, *, sealed: bool = False
    ) -> PendingLink:
        """The trainer's end. Returns at once, with a port to tell the worker.

        Args:
            host: an address of this machine that the worker can reach; no other is bound.
            secret: the worker must know it too.
            timeout_seconds: the longest that any single wait of this link may take.
            sealed: payloads are authenticated; the worker must be told the same.

        Raises TransportError if the address cannot be bound.
        """
        return PendingLink(host, secret, timeout_seconds, sealed=sealed)

    @classmethod
    def connect(
        cls, host: str, port: int, secret: str, timeout_seconds: float, *, sealed: bool = False
    ) -> GlooLink:
        """The worker's end.

        Raises:
            PeerLostError: nobody listens there, or the trainer died.
            AgreementError: who listens there does not know the secret.
            TransportTimeout: the trainer does not go on in time.
        """
        try:
            channel = connect(host, port, secret, timeout_seconds)
        except AgreementError as exc:
            raise AgreementError(
                f"{format_endpoint(host, port)} and this worker do not share the link's secret; "
                "ask the trainer for a new link"
            ) from exc
        with channel:
            return cls(GlooPair(channel, WORKER, timeout_seconds), WORKER, sealed=sealed)

    def send(self, *tensors: torch.Tensor) -> SendHandle:
        """Start to send the bytes of contiguous CPU tensors, straight from their memory.

        The memory must not change until `wait` of what is returned has come back. Keep two or
        more in flight: the next is under way when the receiver asks for it.

        Raises TransportError if a tensor is not contiguous or not in host memory.
        """
        payloads = [_bytes_of(tensor) for tensor in tensors]
        return self._keep(SendHandle(self._pair, payloads, self._own_tags))

    def start_receive(self, *buffers: torch.Tensor) -> ReceiveHandle:
        """Start to receive what one `send` sends: as many contiguous CPU tensors, each of exactly
        the sent bytes, of any dtype.

        The sender's `wait` comes back after this one's. Raises as `send`.
        """
        payloads = [_bytes_of(buffer) for buffer in buffers]
        return self._keep(ReceiveHandle(self._pair, payloads, self._other_tags))

    def receive(self, *buffers: torch.Tensor) -> None:
        """`start_receive`, waited for."""
        self.start_receive(*buffers).wait()

    def close(self) -> None:
        """Hang up. What is in flight is lost, and everyone who waits for it is told."""
        self._pair.close()
        self._transfers = []

    def _keep(self, transfer: TransferT) -> TransferT:
        """Keep it alive, whatever the caller does: Gloo must not lose the memory in its middle."""
        self._transfers = [other for other in self._transfers if not other.done] + [transfer]
        return transfer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class PendingLink:
    """A port that waits for one worker. Strangers are turned away and do not end the wait."""

    def __init__(self, host: str, secret: str, timeout_seconds: float, *, sealed: bool) -> None:
        self._listener = Listener(host, 0, secret)
        self._timeout_seconds = timeout_seconds
        self._sealed = sealed

    @property
    def port(self) -> int:
        return self._listener.port

    def accept(self) -> GlooLink:
        """The link to the worker; the port is closed afterwards.

        Raises:
            TransportTimeout: no worker with the secret came in time.
            PeerLostError: one came and died.
        """
        try:
            started = time.monotonic()
            channel = self._listener.accept(self._timeout_seconds)
            if channel is None:
                raise TransportTimeout(
                    f"no worker with the link's secret came to {self._listener.host}:{self.port} "
                    f"within {time.monotonic() - started:.1f} s; look at the worker's log, and "
                    "whether it can reach this address"
                )
            with channel:
                pair = GlooPair(channel, TRAINER, self._timeout_seconds)
                return GlooLink(pair, TRAINER, sealed=self._sealed)
        finally:
            self.close()

    def close(self) -> None:
        self._listener.close()


class Transfer(ABC):
    """Tensors on their way together."""

    def __init__(self, pair: GlooPair, payloads: list[torch.Tensor], verb: str) -> None:
        self._pair, self._payloads = pair, payloads
        self._nbytes = sum(payload.nbytes for payload in payloads)
        self._what = f"{verb} {self._nbytes:,} bytes"
        self.done = False

    def wait(self) -> None:
        """Until all bytes are in the receiver's buffer. In the order of their start.

        Raises:
            TransportTimeout: they were not within the link's time, counted from now.
            PeerLostError: the other side hung up or died.
            AgreementError: the receiver's buffer has another size; it is unchanged.
            IntegrityError: other bytes arrived than were sent; the buffer holds them.
            TransportError: this side hung up.
        """
        if not self.done:
            self._wait()
            self.done = True
            self._let_go()

    @abstractmethod
    def _wait(self) -> None: ...

    @abstractmethod
    def _let_go(self) -> None:
        """Of the memory: the link keeps what is done until the next transfer begins."""

    def _until(self, *works: Any) -> None:
        for work in works:
            self._pair.wait(work, self._what)


class SendHandle(Transfer):
    def __init__(self, pair: GlooPair, payloads: list[torch.Tensor], tags: Tags | None) -> None:
        super().__init__(pair, payloads, "sending")
        self._receipt = torch.tensor([0])
        # Posted first: from now on, the other side's death is noticed.
        self._received = pair.receive(self._receipt, _RECEIPT_TAG)
        self._sent = [pair.send(payload, _tag_of(payload)) for payload in payloads]
        # The payloads travel while their tag is computed.
        length = self._nbytes.to_bytes(_LENGTH_BYTES, "little")
        self._end = torch.tensor(list(length + _tag(tags, payloads)), dtype=torch.uint8)
        self._sent.append(pair.send(self._end, _LENGTH_TAG))

    def _wait(self) -> None:
        self._until(self._received, *self._sent)

    def _let_go(self) -> None:
        self._payloads, self._sent = [], []


class ReceiveHandle(Transfer):
    def __init__(self, pair: GlooPair, payloads: list[torch.Tensor], tags: Tags | None) -> None:
        super().__init__(pair, payloads, "receiving")
        self._tags = tags
        self._end = torch.zeros(_LENGTH_BYTES + TAG_BYTES, dtype=torch.uint8)
        self._filled = [pair.receive(payload, _tag_of(payload)) for payload in payloads]
        self._ended = pair.receive(self._end, _LENGTH_TAG)

    def _wait(self) -> None:
        self._until(self._ended)
        end = bytes(self._end.tolist())
        sent_bytes = int.from_bytes(end[:_LENGTH_BYTES], "little")
        if sent_bytes != self._nbytes:
            raise self._pair.fail(
                AgreementError(
                    f"the {self._pair.peer} sends {sent_bytes:,} bytes where "
                    f"{self._nbytes:,} are expected; the two follow different plans"
                )
            )
        self._until(*self._filled)
        if not hmac.compare_digest(_tag(self._tags, self._payloads), end[_LENGTH_BYTES:]):
            raise self._pair.fail(
                IntegrityError(
                    f"{self._nbytes:,} bytes arrived that the {self._pair.peer} did not send "
                    "(their authentication tag does not fit); look at who can reach the network "
                    "between the two"
                )
            )
        receipt = torch.tensor([self._nbytes])
        self._until(self._pair.send(receipt, _RECEIPT_TAG))

    def _let_go(self) -> None:
        self._payloads, self._filled = [], []


def _tag(tags: Tags | None, payloads: list[torch.Tensor]) -> bytes:
    """Return the next authentication tag; zeros where the link is not sealed."""
    return bytes(TAG_BYTES) if tags is None else tags.next(*(p.numpy() for p in payloads))


def _tag_of(payload: torch.Tensor) -> int:
    """Different for any two lengths that are less than 2 GiB apart."""
    return _FIRST_PAYLOAD_TAG + payload.nbytes % (MAX_TAG - _FIRST_PAYLOAD_TAG)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, as bytes."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise TransportError(
            f"Gloo moves plain tensors in host memory, not on {tensor.device} ({tensor.layout}); "
            "copy it to one"
        )
    if not tensor.is_contiguous():
        raise TransportError(
            f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not "
            "contiguous; pass tensor.contiguous()"
        )
    return tensor.detach().reshape(-1).view(torch.uint8)
