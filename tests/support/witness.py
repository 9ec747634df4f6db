"""Holds an engine's log-probabilities against those of the trainer that it generates for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from types import SimpleNamespace
from typing import Any

from qerl_sync import SyncSession
from qerl_sync.engines.http import HTTPClient
from qerl_sync.engines.llm import LLMClient
from qerl_sync.sources.hf import probe_of

PROMPT = list(range(5, 15))


class Witness:
    """Asks before and after each sync, and whenever TRL has the engine generate.

    Attributes:
        trainer: to be set once it is built. Until then nothing is asked.
        before, after: the largest gap at each sync.
        generating: the same at each generation of a colocated engine, past whatever guards it.
    """

    def __init__(self, url: str | None = None, *, float32: bool = False) -> None:
        """
        Args:
            url: of the server with the engine; None: it is colocated.
            float32: compute the trainer's answer in float32, whatever dtype its weights have.
        """
        self.trainer: Any = None
        self.before: list[float] = []
        self.after: list[float] = []
        self.generating: list[float] = []
        self._url = url
        self._float32 = float32
        self._asking = False

    def gap(self) -> float:
        """Return the largest difference of a log-probability of a fixed prompt."""
        self._asking = True
        try:
            model = self.trainer.accelerator.unwrap_model(self.trainer.model)
            # The probe evaluates, and restores the mode. Beside its trainer (`when: eager`) that
            # would undo the trainer's own change of it.
            beside = threading.current_thread() is not threading.main_thread()
            if self._float32 or beside:
                model = deepcopy(model)
                vars(model).pop("forward", None)  # accelerate's, of the model that was copied
            if self._float32:
                model = model.float()
            # The asynchronous trainers' own attention takes packed completions, not a prompt.
            right = probe_of(model, attention="eager" if self._url else None).logprobs(PROMPT)
            if self._url:
                said = HTTPClient(self._url).prompt_logprobs(PROMPT)
            else:
                llm = getattr(self.trainer, "vllm_generation", self.trainer).llm
                generate = partial(type(llm).generate, llm)
                bare = SimpleNamespace(generate=generate, llm_engine=llm.llm_engine)
                said = LLMClient(bare).prompt_logprobs(PROMPT)
        finally:
            self._asking = False
        return max(abs(a - b) for a, b in zip(right, said, strict=True))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch all syncs and all colocated generations in this context."""
        from vllm import LLM

        push, generate = SyncSession.push, LLM.generate

        def push_watched(session: Any, *given: Any, **options: Any) -> Any:
            self.before.append(self.gap())
            report = push(session, *given, **options)
            self.after.append(self.gap())
            return report

        def generate_watched(llm: Any, *given: Any, **options: Any) -> Any:
            if self.trainer is not None and not self._asking:
                self.generating.append(self.gap())
            return generate(llm, *given, **options)

        SyncSession.push, LLM.generate = push_watched, generate_watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            SyncSession.push, LLM.generate = push, generate  # type: ignore[method-assign]
