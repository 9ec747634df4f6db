"""The fields that a trainer adds to the calls of vLLM's own engines (`qerl_nccl`, `qerl_ipc`).

    init_weight_transfer_engine   {"qerl_sync": Introduction}
    init_weight_transfer_engine   {what vLLM has there, "qerl_sync": Introduction}
    update_weights                {what vLLM has there, "qerl_sync": Call}

These calls bring nothing back but errors. So there is no Hello: the trainer says what it is and
what it expects, and each worker compares (`worker.admission`). First without anything of vLLM's:
vLLM's nccl trainer waits for its workers while it calls them, for five minutes, and would learn
only then that they have refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from qerl_sync.wire.connection import proof
from qerl_sync.wire.messages import PROTOCOL, TrainerSession

KEY = "qerl_sync"

Expected = Mapping[str, str | int | None]


class _Said(BaseModel):
    # What another version says besides must not hide that it is another.
    model_config = ConfigDict(extra="ignore", frozen=True)


class Introduction(_Said):
    protocol: int
    version: str
    """Of qerl-sync."""
    expected: dict[str, str | int | None] = {}
    """What every worker must say of itself, by the names of `wire.messages.Hello`."""
    session: TrainerSession
    proof: str = ""
    """Shows that the trainer knows the token, for these words and vLLM's; empty: it has none."""


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
