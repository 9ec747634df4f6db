"""Check the calls by which a trainer reaches a worker through vLLM: anybody may make them."""

from __future__ import annotations

import os
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qerl_sync.errors import AgreementError
from qerl_sync.wire import messages as say
from qerl_sync.wire.connection import TOKEN_VARIABLE, proof, same_proof

C = TypeVar("C", bound="_Call")


class _Call(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConnectCall(_Call):
    """Where the trainer's ranks listen, and a proof that the call is the trainer's."""

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
    """Shows that the trainer asks for the worker's thread."""

    number: int
    """Counts its calls, so that none can be repeated."""
    proof: str


def parsed(kind: type[C], call: object) -> C:
    """Parse a call. Raises AgreementError if it is none of ours."""
    try:
        return kind.model_validate(call)
    except ValidationError as exc:
        first = exc.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the call"
        raise AgreementError(
            f"the call is not one of qerl-sync's trainer ({place}: {first['msg']}); drive this "
            "engine with a SyncSession or the trainer engine `qerl`",
            subject="call",
        ) from exc
