"""Check that a trainer may drive vLLM's own engines on this worker, and fits it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from qerl_sync.errors import AgreementError, EngineTakenError
from qerl_sync.wire import handshake as say
from qerl_sync.wire.messages import PROTOCOL, Hello, TrainerSession
from qerl_sync.wire.tokens import TOKEN_VARIABLE, same_proof

S = TypeVar("S", bound=BaseModel)


class Admission:
    """Takes from vLLM's calls what `wire.handshake` has added, and holds it against the worker.

    Where QERL_SYNC_TOKEN is set when this is made, every call must show that it is known. Where it
    is not, vLLM's own trainer engines, which add nothing, are admitted too.
    """

    def __init__(self, hello: Callable[[], Hello]) -> None:
        self._hello = hello
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        self._session: TrainerSession | None = None
        self._calls = 0

    def introduced(self, init_info: Mapping[str, Any]) -> dict[str, Any]:
        """Check a call that introduces a trainer. Return vLLM's part of it.

        Raises:
            AgreementError: the token is wrong or missing, the trainer runs another qerl-sync, or
                expects another worker; the first difference is named.
        """
        rest, reported = _parted(init_info, say.Introduction)
        if reported is not None:
            self._require_own_version(reported)
        self._require_proof(reported, lambda t: say.introduction_proof(rest, t, self._token))
        if reported is not None:
            self._require_expected(reported.expected)
        # No connection tells whether the trainer before is alive. If it is, its next call fails.
        self._session = None if reported is None else reported.session
        self._calls = 0
        return rest

    def called(self, update_info: Mapping[str, Any]) -> dict[str, Any]:
        """Check a call that brings an update. Return vLLM's part of it.

        Raises:
            AgreementError: the token is wrong, or the call was repeated.
            EngineTakenError: another trainer has introduced itself since.
        """
        rest, reported = _parted(update_info, say.Call)
        self._require_proof(reported, lambda t: say.call(t.number, self._token, t.session).proof)
        if reported is not None:
            self._require_own_session(reported)
            if reported.number <= self._calls:
                raise AgreementError(
                    f"the trainer's update {reported.number} was repeated", subject="call"
                )
            self._calls = reported.number
        return rest

    def _require_own_session(self, reported: say.Call) -> None:
        held = self._session
        if held is None or held.id != reported.session:
            raise EngineTakenError(
                f"another trainer drives {self._name} since this one has connected: "
                f"{held or 'one of vLLM, which does not say who it is'}. End one of them, and "
                "connect the other anew",
                **(held.facts() if held else {}),
            )

    def _require_proof(self, reported: Any, right: Callable[[Any], str]) -> None:
        shown = "" if reported is None else reported.proof
        if not self._token and shown:
            raise AgreementError(
                f"the trainer has a {TOKEN_VARIABLE} and this worker none; set the same for both, "
                "or for neither",
                subject="token",
            )
        if self._token and not (shown and same_proof(right(reported), shown)):
            finding = "shows another one" if shown else "does not show it"
            raise AgreementError(
                f"this worker has a {TOKEN_VARIABLE} and the call {finding}; set the same for "
                "both, and let the trainer use the backend qerl_nccl or qerl_ipc "
                "(qerl_sync.integrations.vllm_native)",
                subject="token",
            )

    def _require_own_version(self, reported: say.Introduction) -> None:
        own = self._hello().packages["qerl-sync"]
        if (reported.protocol, reported.version) != (PROTOCOL, own):
            raise AgreementError(
                f"{self._name} runs qerl-sync {own} (protocol {PROTOCOL}), the trainer "
                f"{reported.version} (protocol {reported.protocol}); install the same version for "
                "both",
                subject="version",
            )

    def _require_expected(self, expected: say.Expected) -> None:
        hello = self._hello()
        own = {name: getattr(hello, name) for name in ("model", "dtype", "quantization")}
        own |= hello.layout | hello.packages
        for name, wanted in expected.items():
            if name not in own:
                raise AgreementError(
                    f"the trainer expects {name} {wanted!r}, of which workers say nothing; "
                    f"`expected` may name {', '.join(own)}",
                    subject=name,
                )
            if own[name] != wanted:
                raise AgreementError(
                    f"{self._name} has {name} {own[name]!r}, the trainer expects {wanted!r}; "
                    "start the engine so, or the trainer with another `expected`",
                    subject=name,
                )

    @property
    def _name(self) -> str:
        hello = self._hello()
        return f"worker {hello.rank} of engine {hello.engine}"


def _parted(info: Mapping[str, Any], kind: type[S]) -> tuple[dict[str, Any], S | None]:
    """Return vLLM's part and ours, which may be missing."""
    rest = dict(info)
    reported = rest.pop(say.KEY, None)
    if reported is None:
        return rest, None
    return rest, say.parse(kind, reported, f"what the call says under {say.KEY!r}")
