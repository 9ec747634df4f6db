"""Real vLLM engines in this process, started once and kept for the whole test session."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from support.features import require_kernels
from support.fingerprint import difference, fingerprint
from support.models import make_model, save_model

PROMPTS = [[1, 2, 3, last] for last in range(4)]
OLD, NEW = 0, 1  # seeds of the two versions of a model


@contextlib.contextmanager
def kernels_in_use(kernels: str) -> Iterator[None]:
    """`stock`: CPU kernels pack weights into handles of their own. `plain`: parameters are used as
    they are, as by unquantised GPU kernels. vLLM decides when it processes a layer. `fp8`: stock,
    and the engine quantises what it loads. `bf16`: stock, in bfloat16."""
    if kernels != "plain":
        yield
        return
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    before = _custom_ops._supports_onednn, utils.check_cpu_sgl_kernel
    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *args, **kwargs: False
    try:
        yield
    finally:
        _custom_ops._supports_onednn, utils.check_cpu_sgl_kernel = before


# As small and as quick as an engine can be.
SMALL: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_seqs": 8,
    "dtype": "float32",
    "disable_log_stats": True,
    "num_gpu_blocks_override": 64,  # blocks of 128 tokens or fewer: a few MiB, not GiB
}
ENGINE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "stock": {},
    "plain": {},
    "fp8": {"quantization": "fp8_per_channel", "dtype": "bfloat16"},
    "bf16": {"dtype": "bfloat16"},
}


def start_engine(path: Path, **arguments: Any) -> Any:
    from vllm import LLM

    ours = {"model": str(path), "weight_transfer_config": {"backend": "qerl"}}
    return LLM(**{**SMALL, **ours, **arguments})


def model_of(engine: Any) -> torch.nn.Module:
    from qerl_sync.worker.compat import engine as compat

    return compat.in_process_parts(engine).model


def generate(
    engine: Any, max_tokens: int = 12, more: Sequence[Any] = ()
) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their logprobs for each of `PROMPTS`, and for `more` in vLLM's form."""
    from vllm import SamplingParams

    outputs = engine.generate(
        [*({"prompt_token_ids": prompt} for prompt in PROMPTS), *more],
        SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False, logprobs=0),
        use_tqdm=False,
    )
    return [
        (
            list(output.outputs[0].token_ids),
            [next(iter(step.values())).logprob for step in output.outputs[0].logprobs],
        )
        for output in outputs
    ]


def logprob_gap(engine: Any, trainer_model: Any) -> float:
    """Largest difference between the engine's and the trainer's logprobs of greedy tokens."""
    gap = 0.0
    for prompt, (tokens, logprobs) in zip(PROMPTS, generate(engine), strict=True):
        with torch.no_grad():
            logits = trainer_model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            gap = max(gap, abs(logits[len(prompt) + i - 1, token].item() - logprob))
    return gap


@dataclass
class Subject:
    """An engine under test, the trainer's models of both versions, and what is right for each.

    `weights[v]` and `generations[v]` are those of an engine freshly loaded from version v. `fresh`
    is one of version 1, which nobody syncs.
    """

    kind: str
    kernels: str
    engine: Any
    fresh: Any
    trainers: dict[int, Any]
    weights: dict[int, dict[str, str]]
    generations: dict[int, Any]
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def model(self) -> torch.nn.Module:
        return model_of(self.engine)

    def wrong_weights(self, version: int) -> list[str]:
        """What the kernels hold that a fresh engine of that version does not."""
        return difference(fingerprint(self.model), self.weights[version])

    def generates_as(self, version: int) -> bool:
        """Tokens and logprobs, to the bit."""
        return bool(generate(self.engine) == self.generations[version])

    def enter(self) -> None:
        self._stack.enter_context(kernels_in_use(self.kernels))

    def leave(self) -> None:
        from support.syncs import push

        try:
            if self.wrong_weights(OLD):
                push(self, OLD)
                wrong = self.wrong_weights(OLD)
                assert not wrong, (
                    f"the test left {self.kind}/{self.kernels} unhealable: {wrong[:5]}"
                )
        finally:
            self._stack.close()


class EnginePool:
    """Subjects by kind and kernels."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._subjects: dict[tuple[str, str], Subject] = {}
        # An engine that is collected tears down the process groups of all others.
        self._kept: list[Any] = []

    def subject(self, kind: str, kernels: str) -> Subject:
        require_kernels(kernels)
        # vLLM makes the experts' process group with the first engine of a process, or never.
        if not self._kept and kind != "moe":
            self.subject("moe", "stock")
        if (kind, kernels) not in self._subjects:
            self._subjects[kind, kernels] = self._start(kind, kernels)
        return self._subjects[kind, kernels]

    def start(self, path: Path, **arguments: Any) -> Any:
        """An engine of a test's own, which lives as long as the others."""
        if not self._kept:
            self.subject("moe", "stock")
        self.keep(engine := start_engine(path, **arguments))
        return engine

    def keep(self, engine: Any) -> None:
        """Have an engine live as long as the others."""
        self._kept.append(engine)

    def _start(self, kind: str, kernels: str) -> Subject:
        trainers = {seed: make_model(kind, seed) for seed in (OLD, NEW)}
        paths = {
            seed: save_model(model, self._directory / f"{kind}-{kernels}-{seed}")
            for seed, model in trainers.items()
        }
        with kernels_in_use(kernels):
            engines = {
                seed: start_engine(path, **ENGINE_ARGUMENTS[kernels])
                for seed, path in paths.items()
            }
            self._kept += engines.values()
            return Subject(
                kind=kind,
                kernels=kernels,
                engine=engines[OLD],
                fresh=engines[NEW],
                trainers=trainers,
                weights={seed: fingerprint(model_of(e)) for seed, e in engines.items()},
                generations={seed: generate(e) for seed, e in engines.items()},
            )
