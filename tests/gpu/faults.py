"""Faults on a card: a trainer that is killed, bad sources, memory that runs out in the middle."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu import common
from gpu.common import NEW, OLD

REFUSED_SECONDS = 60.0


def killed(name: str, transport: str) -> dict[str, Any]:
    """SIGKILL a trainer in the middle of a sync. A server refuses to generate; a full sync of
    another trainer heals."""
    common.prepare()
    from faults.trainer import TrainerProcess
    from support import remote

    from gpu.apart import differences, started

    facts: dict[str, Any] = {"engine": name, "transport": transport}
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="qerl-sync-faults-") as directory:
        trainers = {seed: common.model("dense", seed) for seed in (OLD, NEW)}
        arguments = common.engine_arguments("graphs")
        engine = started(name, trainers, Path(directory), arguments)
        try:
            trainer = TrainerProcess(
                engine.client(),
                engine.paths[NEW],
                "in a chunk",
                "kill",
                transport=transport,
                device=common.device(),
            )
            trainer.run()
            if trainer.error is not None:
                found.append(
                    f"the trainer was not killed in its sync: {trainer.error or 'it ended'}"
                )
            if trainer.freed_at is None or trainer.ended_at is None:
                found.append("the worker did not come out of the sync")
            else:
                facts["freed_after_seconds"] = round(trainer.freed_at - trainer.ended_at, 3)
            state = engine.rpc("sync_state")
            facts["state"] = state
            if not all(rank["poisoned"] for rank in state):
                found.append("a worker does not know that it holds half of a sync")
            if any(rank["unfinished"] for rank in state):
                found.append(f"left open: {[rank['unfinished'][:3] for rank in state]}")
            if name == "server":
                facts["refusal"] = _refusal(engine)
                if facts["refusal"]["status"] != 503:
                    found.append("the server does not refuse")
            for version in (NEW, OLD):
                remote.push(engine, version, transport=transport)
                found += [f"healed: {one}" for one in differences(engine, version)]
        finally:
            engine.close()
    return {**common.facts(), **facts, "deviations": found, "passed": not found}


def bad_sources(transport: str) -> dict[str, Any]:
    """A source without a tensor, one with NaN, one that raises in the middle."""
    common.prepare()
    from support import remote

    from gpu.apart import differences, started
    from gpu.exact import altered
    from qerl_sync import HFSource, SyncError

    facts: dict[str, Any] = {"transport": transport}
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="qerl-sync-faults-") as directory:
        trainers = {seed: common.model("dense", seed) for seed in (OLD, NEW)}
        spoiled = common.model("dense", NEW)
        spoiled.model.norm.weight.data[3] = float("nan")
        sources = {
            "missing": altered(trainers[NEW], lacks="model.layers.1.mlp.gate_proj.weight"),
            "NaN": HFSource(spoiled),
            "raises": altered(trainers[NEW], raises_after=20),
        }
        engine = started(
            "own process", trainers, Path(directory), common.engine_arguments("graphs")
        )
        try:
            for what, source in sources.items():
                options = {"transport": transport, "chunk_bytes": "512KiB"}
                with remote.session(engine, source, **options) as session:
                    try:
                        session.push(step=1)
                        found.append(f"{what}: the sync succeeded")
                    except (SyncError, ConnectionResetError) as exc:
                        facts[f"{what}: error"] = f"{type(exc).__name__}: {str(exc)[:300]}"
                    (state,) = engine.rpc("sync_state")
                    facts[f"{what}: poisoned"] = bool(state["poisoned"])
                    if what == "missing" and state["poisoned"]:
                        found.append("missing: the engine was touched")
                    if what == "raises" and not state["poisoned"]:
                        found.append("raises: half of a sync is served")
                    if state["poisoned"]:
                        facts[f"{what}: generate"] = _raised(engine.generate)
                        if facts[f"{what}: generate"] is None:
                            found.append(f"{what}: it generates from half of a sync")
                if not state["poisoned"]:
                    found += [f"{what}: {one}" for one in differences(engine, OLD)]
                for version in (NEW, OLD):
                    remote.push(engine, version, transport=transport)
                    found += [f"{what}, healed: {one}" for one in differences(engine, version)]
        finally:
            engine.close()
    return {**common.facts(), **facts, "deviations": found, "passed": not found}


def out_of_memory(mode: str, on_failure: str) -> dict[str, Any]:
    """Take the rest of the card away in the middle of a load, so that vLLM cannot materialise the
    next layer. Another process's memory would do the same."""
    common.prepare()
    import torch

    from gpu.exact import Proof, altered

    if common.device() == "cpu":
        return {**common.facts(), "passed": None, "not_run": "needs a GPU"}

    def take() -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)

    # A layer's matrices are larger than what may be left free in the blocks that are allocated.
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2}
    with tempfile.TemporaryDirectory(prefix="qerl-sync-faults-") as directory:
        proof = Proof("dense", mode, None, Path(directory), **sizes)
    found = proof.deviations
    proof.sync(NEW)
    source = altered(proof.trainers[OLD], calls=(8, take))
    try:
        error = proof.fails(source, on_failure=on_failure, chunk_bytes="8MiB")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    if "OutOfMemory" not in error:
        found.append("the error does not name the cause")
    if on_failure == "rollback":
        proof.step("rolled back", proof.hold_against, NEW, committed=False)
    else:
        proof.step("poisoned", proof.refuses)
    proof.step("healed", proof.sync, OLD)
    proof.step("and again", proof.sync, NEW)
    return {
        **common.facts(),
        "mode": mode,
        "on_failure": on_failure,
        "error": error,
        "measured": proof.measured,
        "deviations": found,
        "passed": not found,
    }


def _refusal(server: Any) -> dict[str, Any]:
    """Return how the server refuses a request, once it has noticed that its trainer is gone. One
    that comes sooner waits in the paused engine."""
    import requests
    from support.remote import completion_request

    url, start = server.process.url, time.monotonic()
    while (
        requests.get(f"{url}/qerl_sync/ready", timeout=REFUSED_SECONDS).status_code == 200
        and time.monotonic() - start < REFUSED_SECONDS
    ):
        time.sleep(0.1)
    noticed = time.monotonic()
    body = completion_request(str(server.paths[OLD]), common.PROMPTS[0], 4)
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=REFUSED_SECONDS)
    return {
        "status": answer.status_code,
        "text": answer.text[:300],
        "noticed_after_seconds": round(noticed - start, 3),
        "refused_after_seconds": round(time.monotonic() - noticed, 3),
    }


def _raised(call: Callable[[], Any]) -> str | None:
    """Return what it raises; None if nothing."""
    try:
        call()
    except Exception as exc:
        return f"{type(exc).__name__}: {str(exc)[:200]}"
    return None


def _cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the cases, those that say most first."""
    yield "killed-server-shm", partial(killed, "server", "shm")
    yield "out-of-memory-graphs-poison", partial(out_of_memory, "graphs", "poison")
    yield "killed-llm-cuda_ipc", partial(killed, "own process", "cuda_ipc")
    yield "bad-sources-shm", partial(bad_sources, "shm")
    yield "out-of-memory-eager-rollback", partial(out_of_memory, "eager", "rollback")
    yield "killed-server-cuda_ipc", partial(killed, "server", "cuda_ipc")
    yield "bad-sources-cuda_ipc", partial(bad_sources, "cuda_ipc")
    yield "killed-llm-shm", partial(killed, "own process", "shm")


CASES: dict[str, Callable[[], dict[str, Any]]] = dict(_cases())
COST: dict[str, tuple[float, float]] = dict.fromkeys(CASES, (4.0, 90.0))
