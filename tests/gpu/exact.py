"""After each of many syncs an engine in this process is, to the bit, what a fresh one would be.

Both engines are of this process. The fresh one is started first and then only remembered: graphs
that vLLM captures share a pool and workspaces, so that those of an older engine must not run.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu import common, report
from gpu.common import NEW, OLD

MAX_TOKENS = 16

# What the syncs vary, in turn.
ORDERS: Sequence[dict[str, Any]] = (
    {},
    {"source_order": "random:1"},
    {"source_order": "random:2", "policy": "warn"},
    {"verify": "checksum"},
    {"source_order": "interleaved:3", "chunk_bytes": "256KiB"},
    {"source_order": "size", "policy": "warn", "verify": "checksum"},
)


def run(
    kind: str, mode: str, quantization: str | None = None, *, syncs: int = 20
) -> dict[str, Any]:
    """Run one case: syncs that succeed, syncs that are refused, syncs that fail."""
    common.prepare()
    from support.fingerprint import difference

    with tempfile.TemporaryDirectory(prefix="qerl-sync-exact-") as directory:
        proof = Proof(kind, mode, quantization, Path(directory))
    wanted, found = proof.wanted, proof.deviations
    if not difference(wanted[OLD].weights, wanted[NEW].weights):
        found.append("both versions hold the same weights: nothing is shown")
    if wanted[OLD].answers == wanted[NEW].answers:
        found.append("both versions answer alike: nothing is shown")

    for number in range(syncs):
        version = NEW if number % 2 == 0 else OLD
        proof.step(f"sync {number + 1}", proof.sync, version, **ORDERS[number % len(ORDERS)])
    proof.step("a tensor is missing", proof.refused, proof.without_one)
    proof.step("NaN", proof.refused, proof.with_nan)
    proof.step("a source that raises", proof.poisoned)
    proof.step("a full sync heals", proof.sync, NEW)
    proof.step("a source that raises, rollback", proof.rolled_back)
    proof.step("a sync after a rollback", proof.sync, OLD)
    return {
        **common.facts(),
        "kind": kind,
        "mode": mode,
        "quantization": quantization,
        "tensors_compared": len(wanted[NEW].weights),
        "different_between_versions": len(difference(wanted[OLD].weights, wanted[NEW].weights)),
        "steps": proof.steps,
        "measured": proof.measured,
        "start_seconds": proof.start_seconds,
        "sync_seconds": proof.sync_seconds,
        "deviations": found,
        "passed": not found,
    }


class Wanted:
    """What an engine that was started from a checkpoint holds, and answers."""

    def __init__(self, engine: Any) -> None:
        from support.engines import model_of
        from support.fingerprint import fingerprint

        self.weights = fingerprint(model_of(engine))
        self.answers = answers(engine)
        engine.reset_prefix_cache()
        self.deterministic = answers(engine) == self.answers
        engine.reset_prefix_cache()


class Proof:
    """An engine, what it should be on either version, and the deviations found so far."""

    def __init__(
        self, kind: str, mode: str, quantization: str | None, directory: Path, **changes: Any
    ) -> None:
        from support.engines import model_of
        from support.models import save_model

        self.deviations: list[str] = []
        self.steps: list[str] = []
        self.measured: dict[str, Any] = {}
        self.start_seconds: list[float] = []
        self.sync_seconds: list[float] = []
        self.trainers = {seed: common.model(kind, seed, **changes) for seed in (OLD, NEW)}
        arguments = common.engine_arguments(mode, quantization)
        self.wanted: dict[int, Wanted] = {}
        self._engines = []  # one that is collected takes the process groups of the other with it
        for seed in (NEW, OLD):
            path = save_model(self.trainers[seed], directory / str(seed))
            self._engines.append(self._start(path, arguments))
            self.wanted[seed] = Wanted(self._engines[-1])
        self.engine = self._engines[-1]
        self.model = model_of(self.engine)
        self._pointers = pointers(self.model)
        self._replays = replays_counted()
        self._replays_graphs = common.device() == "cuda" and mode != "eager"
        if not all(one.deterministic for one in self.wanted.values()):
            # Then answers are no witness of anything; weights still are.
            self.measured["answers_compared"] = False
        self.compares_answers = self.measured.setdefault("answers_compared", True)

    def _start(self, path: Path, arguments: dict[str, Any]) -> Any:
        from vllm import LLM

        start = time.perf_counter()
        engine = LLM(str(path), **arguments)
        self.start_seconds.append(round(time.perf_counter() - start, 2))
        return engine

    def step(self, name: str, action: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Do something; what it raises is a deviation, and the next step is tried all the same."""
        self.steps.append(name)
        before = len(self.deviations)
        try:
            action(*arguments, **options)
        except Exception as exc:
            self.deviations.append(f"{type(exc).__name__}: {str(exc)[:600]}")
        self.deviations[before:] = [f"{name} {options}: {d}" for d in self.deviations[before:]]
        found = {"steps": self.steps, "deviations": self.deviations, "measured": self.measured}
        report.keep(found)

    def sync(self, version: int, source: Any = None, **options: Any) -> None:
        report = self._push(source or self._source(version), **options)
        self.sync_seconds.append(round(report.seconds["total"], 4))
        self.hold_against(version)
        measured, predicted = (
            report.peak_buffered_bytes_measured,
            report.peak_buffered_bytes_predicted,
        )
        if measured != predicted:
            self.deviations.append(f"{measured} bytes were buffered, {predicted} predicted")
        if not report.prediction_exact:
            self.deviations.append(f"trace: {report.first_difference}")
        if "chunk_bytes" in options and report.num_chunks < 3:
            self.deviations.append(f"{report.num_chunks} chunks: nothing is shown of chunks")
        moved = [
            name for name, at in pointers(self.model).items() if self._pointers.get(name) != at
        ]
        if moved:
            self.deviations.append(f"{len(moved)} tensors have moved: {moved[:5]}")

    def refused(self, make_source: Callable[[], Any]) -> None:
        """A source that cannot be right: nothing of the engine is touched."""
        error = self.fails(make_source())
        self.measured[f"{make_source.__name__}: error"] = error
        self.hold_against(OLD, committed=False)

    def poisoned(self) -> None:
        self.measured["poisoned: error"] = self.fails(self._cut(), policy="warn")
        self.refuses()

    def refuses(self) -> None:
        """Half of a sync is never computed with, and the answer does not hang."""
        from qerl_sync import PoisonedError

        start = time.perf_counter()
        try:
            answers(self.engine)
            self.deviations.append("it generates from half of a sync")
        except PoisonedError:
            pass
        self.measured["poisoned: refused after seconds"] = round(time.perf_counter() - start, 4)

    def rolled_back(self) -> None:
        cut = self._cut(OLD)
        self.measured["rollback: error"] = self.fails(cut, on_failure="rollback", policy="warn")
        self.hold_against(NEW, committed=False)

    def without_one(self) -> Any:
        return altered(self.trainers[NEW], lacks="model.layers.1.self_attn.q_proj.weight")

    def with_nan(self) -> Any:
        import copy

        spoiled = copy.deepcopy(self.trainers[NEW])
        spoiled.model.norm.weight.data[3] = float("nan")
        from qerl_sync import HFSource

        return HFSource(spoiled)

    def _cut(self, version: int = NEW) -> Any:
        return altered(self.trainers[version], raises_after=20)

    def _source(self, version: int) -> Any:
        from qerl_sync import HFSource

        return HFSource(self.trainers[version])

    def _push(self, source: Any, **options: Any) -> Any:
        from qerl_sync import InProcessTransport, SyncConfig, SyncSession

        transport = InProcessTransport(self.engine)
        with SyncSession(source, transport, SyncConfig.of(**options)) as session:
            return session.push(step=1)

    def fails(self, source: Any, **options: Any) -> str:
        """Push what must fail, and return the error."""
        from qerl_sync import SyncError

        try:
            self._push(source, **options)
        except SyncError as exc:
            return f"{type(exc).__name__}: {str(exc)[:300]}"
        self.deviations.append("the sync succeeded")
        return ""

    def hold_against(self, version: int, *, committed: bool = True) -> None:
        """Hold the engine against a fresh one of that version.

        Args:
            committed: a sync has just emptied the caches. Otherwise the prefix cache is emptied
                here: with hits in it other shapes are computed, and other kernels round otherwise.
        """
        from support.fingerprint import difference, fingerprint

        wanted = self.wanted[version]
        wrong = difference(fingerprint(self.model), wanted.weights)
        if wrong:
            self.deviations.append(f"{len(wrong)} tensors are not a fresh engine's: {wrong[:5]}")
        if not committed:
            self.engine.reset_prefix_cache()
        before = self._replays[0]
        answered = answers(self.engine)
        if answered != wanted.answers and self.compares_answers:
            gap = common.gap(answered, wanted.answers)
            self.deviations.append(f"it answers otherwise than a fresh engine, by {gap:.3g}")
        self.measured["graph_replays_of_an_answer"] = self._replays[0] - before
        if self._replays_graphs and self._replays[0] == before:
            self.deviations.append("no graph was replayed: nothing is shown of graphs")


def answers(engine: Any) -> list[Any]:
    """Return greedy tokens, and the log-probabilities of the five likeliest at each step."""
    from vllm import SamplingParams

    asked = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False, logprobs=5
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in common.PROMPTS]
    return [
        [
            list(output.outputs[0].token_ids),
            [{t: one.logprob for t, one in step.items()} for step in output.outputs[0].logprobs],
        ]
        for output in engine.generate(prompts, asked, use_tqdm=False)
    ]


def replays_counted() -> list[int]:
    """Return a list whose one number counts, from here on, the replays of CUDA graphs."""
    import torch

    count, replay = [0], torch.cuda.CUDAGraph.replay

    def counted(graph: Any) -> None:
        count[0] += 1
        replay(graph)

    torch.cuda.CUDAGraph.replay = counted  # type: ignore[method-assign]
    return count


def pointers(model: Any) -> dict[str, int]:
    """Return where each parameter and buffer lies. Captured graphs read there, whatever comes."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.data_ptr() for name, tensor in {**parameters, **buffers}.items()}


def altered(
    model: Any,
    *,
    lacks: str = "",
    raises_after: int | None = None,
    calls: tuple[int, Callable[[], None]] | None = None,
) -> Any:
    """Return a source of the model that goes wrong.

    Args:
        lacks: the name of a tensor that it does not have.
        raises_after: how many tensors it yields before it raises.
        calls: how many tensors it yields before it calls something, once.
    """
    from qerl_sync import HFSource

    class Altered(HFSource):
        yielded = 0

        def metadata(self) -> list[Any]:
            return [meta for meta in super().metadata() if meta.name != lacks]

        def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
            for item in super().materialize(names):
                if self.yielded == raises_after:
                    raise ConnectionResetError("the source is gone")
                if calls is not None and self.yielded == calls[0]:
                    calls[1]()
                self.yielded += 1
                yield item

    return Altered(model)


def _cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the cases, those that say most first."""
    for kind, quantization, mode in (
        ("dense", None, "graphs"),
        ("moe", None, "graphs"),
        ("dense", "fp8", "graphs"),
        ("moe", "fp8", "graphs"),
        ("dense", None, "compiled"),
        ("dense", "fp8_per_channel", "graphs"),
        ("moe", "fp8_per_channel", "graphs"),
        ("bias", None, "graphs"),
        ("tied", None, "graphs"),
        ("dense", None, "eager"),
        ("moe", None, "eager"),
        ("moe", None, "compiled"),
        ("dense", "fp8", "compiled"),
        ("dense", "fp8_per_block", "graphs"),
        ("moe", "fp8_per_block", "graphs"),
        ("dense", "fp8", "eager"),
        ("moe", "fp8", "eager"),
        ("dense", "fp8_per_channel", "eager"),
        ("moe", "fp8_per_channel", "eager"),
        ("bias", None, "eager"),
        ("tied", None, "eager"),
    ):
        yield f"{kind}-{quantization or 'bf16'}-{mode}", partial(run, kind, mode, quantization)


CASES: dict[str, Callable[[], dict[str, Any]]] = dict(_cases())
COST: dict[str, tuple[float, float]] = {
    name: (3.0, 100.0 if name.endswith("compiled") else 60.0) for name in CASES
}
