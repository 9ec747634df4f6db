"""A worker rank's connection to the trainer: who may open it, what it proves, what it is used for.

No vLLM in here: the calls come from an engine (`worker.engine`), or from whatever else lends a
thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qerl_sync.errors import AgreementError, EngineTakenError, SyncError, TransportError
from qerl_sync.wire import cuda_memory
from qerl_sync.wire import messages as say
from qerl_sync.wire.channel import (
    TOKEN_VARIABLE,
    Channel,
    connect,
    parse_endpoint,
    proof,
    same_proof,
)
from qerl_sync.wire.device_segments import AttachedDeviceSegment
from qerl_sync.wire.segments import AttachedSegment
from qerl_sync.worker.protocol.chunk_receivers import (
    ChunkReceiver,
    CudaIpcReceiver,
    ObjectStoreReceiver,
    ShmReceiver,
    TcpInlet,
)
from qerl_sync.worker.protocol.inbox import Inbox
from qerl_sync.worker.protocol.session import Loader, WorkerSession

C = TypeVar("C", bound="_Call")


class _Call(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConnectCall(_Call):
    """Where the trainer's ranks listen, and what shows that it is the trainer who asks."""

    endpoints: Annotated[list[str], Field(min_length=1)]
    """`host:port` of each trainer rank, in rank order; an IPv6 address in brackets."""
    proof: str
    """Shows that who sends this knows the token."""
    session: say.TrainerSession
    """The worker keeps it while the trainer is connected, and refuses every other one."""
    token: str = ""
    """The secret of both sides. Empty where the worker has its own, in the environment variable
    QERL_SYNC_TOKEN; it then never travels."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """How long either side waits for the other."""


class TalkCall(_Call):
    """Shows that the trainer asks for the worker's thread."""

    number: int
    """Counts its calls, so that none can be repeated."""
    proof: str


class TrainerConnection:
    """Opened by a call that knows the token, used by calls that prove it again.

    Args:
        loader: takes the weights (`worker.receiver.Receiver`).
        hello: what the worker says of itself.
    """

    def __init__(
        self, loader: Loader, device: torch.device, hello: Callable[[], say.Hello]
    ) -> None:
        self._loader = loader
        self._device = device
        self._hello = hello
        self._inboxes: list[Inbox] = []
        self._token = ""
        self._session: say.TrainerSession | None = None
        self._calls = 0

    def open(self, call: object) -> None:
        """Connect to every rank of the trainer and agree on how bytes will travel.

        Args:
            call: from anybody, and of any form; `ConnectCall` says of which it must be.

        Raises:
            AgreementError: the call is none of ours, or the token is wrong.
            EngineTakenError: another trainer's session is connected. The caller is told on a
                connection of its own, too: through vLLM only a text gets back.
            TransportError: the trainer cannot be reached.
        """
        reported = _checked(ConnectCall, call)
        token = self._admitted(reported)
        held = self._session
        if held and held != reported.session and any(inbox.alive for inbox in self._inboxes):
            refusal = EngineTakenError(
                f"another trainer is connected: {held}. Close its session, or end that process; "
                "then try again. To sync one engine from several trainer ranks, give them the "
                "same endpoints (RemoteTransport)",
                **held.facts(),
            )
            for endpoint in reported.endpoints:
                with suppress(SyncError), self._reach(endpoint, token, reported) as channel:
                    channel.send(say.failure(refusal), reported.timeout_seconds)
            raise refusal
        self.close()
        try:
            for endpoint in reported.endpoints:
                self._inboxes.append(self._connect(endpoint, token, reported))
            self._token, self._session, self._calls = token, reported.session, 0
            self._worker_session = WorkerSession(self._loader, self._inboxes, self._device)
            for inbox in self._inboxes:
                _open_transport(inbox, self._device)
        except BaseException:
            self.close()
            raise

    def serve(self, call: object) -> None:
        """Serve the trainer's requests until it says End. Its failures are told to it alone.

        Args:
            call: from anybody, and of any form; `TalkCall` says of which it must be.

        Raises:
            AgreementError: nobody is connected, or who calls is not who is.
        """
        reported = _checked(TalkCall, call)
        if not self._inboxes:
            raise AgreementError("no trainer is connected to this worker")
        if not same_proof(proof(self._token, "update", reported.number), reported.proof):
            raise AgreementError("the call does not come from the trainer that is connected")
        if reported.number <= self._calls:
            raise AgreementError(f"the trainer's call {reported.number} was repeated")
        self._calls = reported.number
        self._worker_session.serve()

    def close(self) -> None:
        """Let go of the trainer and of its memory."""
        for inbox in self._inboxes:
            inbox.close()
        self._inboxes = []

    def _admitted(self, reported: ConnectCall) -> str:
        """Return the token, if the caller knows it."""
        own = os.environ.get(TOKEN_VARIABLE, "")
        token = own or reported.token
        if not token or not same_proof(proof(token, "init", *reported.endpoints), reported.proof):
            raise AgreementError(
                f"the token is wrong; set the same {TOKEN_VARIABLE} for trainer and server"
                if own
                else "the call brings no token, or one that does not fit it"
            )
        return token

    def _reach(self, endpoint: str, token: str, reported: ConnectCall) -> Channel:
        return connect(*parse_endpoint(endpoint), token, reported.timeout_seconds)

    def _connect(self, endpoint: str, token: str, reported: ConnectCall) -> Inbox:
        channel = self._reach(endpoint, token, reported)
        try:
            channel.send(self._hello(), reported.timeout_seconds)
        except BaseException:
            channel.close()
            raise
        return Inbox(channel, reported.timeout_seconds)


def _checked(kind: type[C], call: object) -> C:
    try:
        return kind.model_validate(call)
    except ValidationError as exc:
        first = exc.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the call"
        raise AgreementError(
            f"the call is not one of qerl-sync's trainer ({place}: {first['msg']}); drive this "
            "engine with a SyncSession or the trainer engine `qerl`"
        ) from exc


def _open_transport(inbox: Inbox, device: torch.device) -> None:
    """Try what the trainer proposes until it is satisfied."""
    while not isinstance(proposal := inbox.next("how bytes will travel"), say.End):
        if not isinstance(proposal, say.Welcome):
            raise TransportError(f"{type(proposal).__name__} arrived where Welcome was next")
        try:
            inbox.chunk_receiver, options = _chunk_receiver(proposal, inbox, device)
        except (SyncError, KeyError, ValueError, RuntimeError) as exc:  # RuntimeError: of torch
            inbox.send(say.failure(exc))
        else:
            inbox.send(say.Ready(options=options))


def _chunk_receiver(
    proposal: say.Welcome, inbox: Inbox, device: torch.device
) -> tuple[ChunkReceiver, dict[str, Any]]:
    if proposal.transport == "cuda_ipc":
        probe = say.Segment.model_validate(proposal.options["probe"])
        device = cuda_memory.concrete_device(device)  # the thread of the inbox has another current
        # Nothing refers to it when the answer leaves: the trainer frees the probe then.
        read = AttachedDeviceSegment(probe.handle, probe.nbytes, device).read(0, probe.nbytes)
        return CudaIpcReceiver(device), {"probe": read.hex()}
    if proposal.transport == "shm":
        probe = say.Segment.model_validate(proposal.options["probe"])
        segment = AttachedSegment(probe.name, probe.nbytes)
        return ShmReceiver(), {"probe": segment.read(0, probe.nbytes).hex()}
    if proposal.transport == "tcp":
        inbox.channel.sealed = bool(proposal.options["sealed"])
        return TcpInlet(inbox.channel, proposal.timeout_seconds), {}
    if proposal.transport == "ray":
        return ObjectStoreReceiver(str(proposal.options["key"]), proposal.timeout_seconds), {}
    raise TransportError(f"this worker's engine does not receive over {proposal.transport}")
