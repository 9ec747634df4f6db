"""Define what a trainer says in vLLM's calls. Anybody may make them, so each is checked.

With the backend `qerl` they only have the worker connect, and give our session its thread:

    init_weight_transfer_engine   ConnectCall
    update_weights                ServeCall

To the calls of vLLM's own engines (`qerl_nccl`, `qerl_ipc`) the trainer adds fields:

    init_weight_transfer_engine   {"qerl_sync": Introduction}
    init_weight_transfer_engine   {what vLLM has there, "qerl_sync": Introduction}
    update_weights                {what vLLM has there, "qerl_sync": Call}

These calls bring nothing back but errors. So there is no Hello: the trainer says what it is and
what it expects, and each worker compares (`worker.protocol.admission`). First without anything of
vLLM's: vLLM's nccl trainer waits for its workers while it calls them, for five minutes, and would
learn only then that they have refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qerl_sync.errors import AgreementError
from qerl_sync.wire.messages import PROTOCOL, TrainerSession
from qerl_sync.wire.tokens import TOKEN_VARIABLE, proof, same_proof

KEY = "qerl_sync"

Expected = Mapping[str, str | int | None]
S = TypeVar("S", bound=BaseModel)


def parse(kind: type[S], said: object, what: str = "the call") -> S:
    """Parse what a caller has sent.

    Raises:
        AgreementError: it is not of qerl-sync's trainer.
    """
    try:
        return kind.model_validate(said)
    except ValidationError as exc:
        first = exc.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise AgreementError(
            f"{what} is not of qerl-sync's trainer ({place}: {first['msg']}); drive this engine "
            "with a SyncSession or a trainer engine of ours, and install the same version for both",
            subject="call",
        ) from exc


class _Call(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConnectCall(_Call):
    """Has the worker connect to each rank of the trainer."""

    endpoints: Annotated[list[str], Field(min_length=1)]
    """`host:port` of each trainer rank, in rank order; an IPv6 address in brackets."""
    proof: str
    """Proves that the caller knows the token."""
    session: TrainerSession
    """The worker keeps it while the trainer is connected, and refuses every other one."""
    token: str = ""
    """The secret of both sides. Empty where the worker has its own, in the environment variable
    QERL_SYNC_TOKEN; it then never travels."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """The longest that either side waits for the other."""

    def require_token(self) -> str:
        """Return the token.

        Raises:
            AgreementError: the caller does not know it.
        """
        own = os.environ.get(TOKEN_VARIABLE, "")
        token = own or self.token
        if not token or not same_proof(proof(token, "init", *self.endpoints), self.proof):
            raise AgreementError(
                f"the token is wrong; set the same {TOKEN_VARIABLE} for trainer and server"
                if own
                else "the call brings no token, or one that does not fit it",
                subject="token",
            )
        return token


class ServeCall(_Call):
    """Gives the trainer the worker's thread."""

    number: int
    """Counts its calls, so that none can be repeated."""
    proof: str


class _Said(BaseModel):
    # Fields that another version adds must not fail before the versions are compared.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Introduction(_Said):
    protocol: int
    version: str
    """qerl-sync's."""
    expected: dict[str, str | int | None] = {}
    """Values that every worker must have, by the names of `wire.messages.Hello`."""
    session: TrainerSession
    proof: str = ""
    """Proves that the trainer knows the token, for this call alone; empty: it has none."""


class Call(_Said):
    number: int
    """Counts the updates since the introduction, so that none can be repeated."""
    session: str = ""
    """`id` of the session that was introduced."""
    proof: str = ""


def introduction(
    init_info: Mapping[str, Any],
    version: str,
    expected: Expected,
    token: str,
    session: TrainerSession,
) -> Introduction:
    """Return the introduction to go with `init_info`. `token`: empty where the trainer has none."""
    said = Introduction(
        protocol=PROTOCOL, version=version, expected=dict(expected), session=session
    )
    return said.model_copy(update={"proof": introduction_proof(init_info, said, token)})


def introduction_proof(init_info: Mapping[str, Any], said: Introduction, token: str) -> str:
    whole = [init_info, said.model_dump(exclude={"proof"})]
    return proof(token, "init", json.dumps(whole, sort_keys=True)) if token else ""


def call(number: int, token: str, session: str) -> Call:
    """Return the proof of update `number`."""
    shown = proof(token, "update", number, session) if token else ""
    return Call(number=number, session=session, proof=shown)
