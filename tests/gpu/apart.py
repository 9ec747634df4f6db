"""Engines in processes of their own are, after each sync, what a fresh one would be.

The fresh engine is started first, asked, and shut down.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu import common
from gpu.common import NEW, OLD

# Log-probabilities of two processes: each tunes its kernels, 2.4e-7 was seen with equal weights.
ROUNDING = 1e-5


def run(
    kind: str, mode: str, quantization: str | None, transport: str, *, syncs: int = 6
) -> dict[str, Any]:
    """Run one case: syncs from one session, whose trainer changes its weights in place."""
    common.prepare()
    from support import remote

    from qerl_sync import HFSource

    with tempfile.TemporaryDirectory(prefix="qerl-sync-apart-") as directory:
        trainers = {seed: common.model(kind, seed) for seed in (OLD, NEW)}
        arguments = common.engine_arguments(mode, quantization)
        engine = started("own process", trainers, Path(directory), arguments)
        deviations, seconds, transports, errors = [], [], [], []
        trained = common.model(kind, OLD)
        try:
            with remote.session(engine, HFSource(trained), transport=transport) as session:
                for step in range(1, syncs + 1):
                    version = NEW if step % 2 else OLD
                    trained.load_state_dict(trainers[version].state_dict())
                    try:
                        report = session.push(step=step)
                    except Exception as exc:
                        errors.append(f"sync {step}: {type(exc).__name__}: {str(exc)[:600]}")
                        continue
                    seconds.append({k: round(v, 4) for k, v in report.seconds.items()})
                    transports.append(report.transport)
                    found = differences(engine, version)
                    if not report.prediction_exact:
                        found.append(f"trace: {report.first_difference}")
                    deviations += [f"sync {step}: {one}" for one in found]
        finally:
            engine.close()
        return {
            **common.facts(),
            "kind": kind,
            "mode": mode,
            "quantization": quantization,
            "asked_transport": transport,
            "transports": sorted(set(transports)),
            "answers_compared": engine.deterministic,
            "start_seconds": engine.start_seconds,
            "syncs": len(seconds),
            "sync_seconds": seconds,
            "deviations": errors + deviations,
            "passed": not errors and not deviations,
        }


def started(name: str, trainers: dict[int, Any], directory: Path, arguments: dict[str, Any]) -> Any:
    """Return an engine of `support.remote.ENGINES` on version OLD, which knows what a fresh engine
    of NEW, started before it in a process of its own, holds and answers."""
    from support import remote
    from support.models import save_model

    start = time.monotonic()
    fresh_path = save_model(trainers[NEW], directory / "fresh")
    held, answers, deterministic = _fresh(fresh_path, arguments)
    fresh_seconds = round(time.monotonic() - start, 1)

    class Engine(remote.ENGINES[name][0]):  # type: ignore[misc]
        prompts = common.PROMPTS

        def fresh_weights(self) -> dict[int, list[dict[str, str]]]:
            return {OLD: self.rpc("held_weights"), NEW: held}

    engine = Engine(trainers, directory, **arguments)
    engine.generations[NEW] = answers
    engine.deterministic = deterministic
    engine.start_seconds = [fresh_seconds, round(time.monotonic() - start - fresh_seconds, 1)]
    return engine


def differences(engine: Any, version: int) -> list[str]:
    """Return what parts the engine from a fresh one of that version. Asks it once for each prompt:
    a second time, prefixes would come out of the cache, computed in other shapes."""
    wrong = engine.wrong_weights(version)
    found = [f"{len(wrong)} tensors are not a fresh engine's: {wrong[:5]}"] if wrong else []
    gap = common.gap(engine.generate(), engine.generations[version])
    if gap > ROUNDING and engine.deterministic:
        found.append(f"it answers otherwise than a fresh engine, by {gap:.3g}")
    return found


def _fresh(path: Path, arguments: dict[str, Any]) -> tuple[list[dict[str, str]], list[Any], bool]:
    """Return what a fresh engine's ranks hold, what it answers, and whether it does so again."""
    from support import remote
    from support.engines import start_engine

    with remote.engine_environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}):
        llm = start_engine(path, **remote.ENGINE, **arguments)
    try:
        held = llm.collective_rpc("held_weights")
        answers = []
        for _ in range(2):
            answers.append(
                [remote._complete(llm, prompt, remote.MAX_TOKENS) for prompt in common.PROMPTS]
            )
            llm.reset_prefix_cache()
        return held, answers[0], answers[0] == answers[1]
    finally:
        remote._shut_down(llm.llm_engine.engine_core)


def _cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the cases, those that say most first."""
    for kind, quantization, mode, transport in (
        ("dense", None, "graphs", "cuda_ipc"),
        ("dense", None, "graphs", "shm"),
        ("moe", "fp8", "graphs", "cuda_ipc"),
        ("moe", None, "graphs", "shm"),
        ("dense", None, "graphs", "tcp"),
        ("dense", "fp8", "compiled", "cuda_ipc"),
        ("dense", "fp8_per_channel", "eager", "shm"),
        ("dense", None, "eager", "auto"),
    ):
        name = f"{kind}-{quantization or 'bf16'}-{mode}-{transport}"
        yield name, partial(run, kind, mode, quantization, transport)


CASES: dict[str, Callable[[], dict[str, Any]]] = dict(_cases())
COST: dict[str, tuple[float, float]] = dict.fromkeys(CASES, (4.0, 90.0))
