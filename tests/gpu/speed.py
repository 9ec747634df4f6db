"""How fast weights reach an engine, beside copies of the same bytes and vLLM's own loading.

Each row: the median of some rounds, after two that do not count.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu import common, report

ROUNDS, WARM_UPS = 5, 2
SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
UNVERIFIED = {"verify": "off", "check_finite": False, "on_unchanged": "ignore"}
LEVELS: dict[str, dict[str, Any]] = {
    "unverified": UNVERIFIED,
    "coverage (default)": {},
    "checksum": {"verify": "checksum"},
}


class Rows:
    """The facts of a case, which grow by a row for each thing that is timed."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.facts: dict[str, Any] = {**common.facts(), "gb": nbytes / report.GB, "rows": []}

    def time(self, name: str, action: Callable[[], Any], rounds: int = ROUNDS) -> list[Any]:
        """Time it. What it raises is its row. Return what it returned in each round."""
        seconds, returned = [], []
        try:
            for number in range(WARM_UPS + rounds):
                synchronize()
                start = time.perf_counter()
                result = action()
                synchronize()
                if number >= WARM_UPS:
                    seconds.append(time.perf_counter() - start)
                    returned.append(result)
            median = statistics.median(seconds)
            row = {"what": name, "seconds": median, "gb_per_s": self.nbytes / report.GB / median}
        except Exception as exc:
            row = {"what": name, "error": f"{type(exc).__name__}: {str(exc)[:300]}"}
        self.facts["rows"].append(row)
        report.keep(self.facts)
        return returned

    def push(self, name: str, session: Any) -> None:
        """Time a session's pushes, and their phases."""
        step = iter(range(1, 1000))
        reports = self.time(name, lambda: session.push(step=next(step)))
        row = self.facts["rows"][-1]
        if reports:
            phases = reports[0].seconds
            row |= {p: statistics.median(r.seconds[p] for r in reports) for p in phases}
            row["transport"] = reports[-1].transport
            row["chunks"] = reports[-1].num_chunks
            report.keep(self.facts)


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def trainer() -> Any:
    """Return a model with random weights where a trainer has it."""
    import torch
    from transformers import AutoModelForCausalLM

    shape = common.config("dense", **(SHAPE if common.device() == "cuda" else {}))
    with torch.device(common.device()):
        return AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)


def start(model: Any, **more: Any) -> Any:
    from vllm import LLM

    with tempfile.TemporaryDirectory(prefix="qerl-sync-speed-") as directory:
        model.config.architectures = ["Qwen3ForCausalLM"]
        model.config.save_pretrained(directory)
        return LLM(directory, **common.engine_arguments("eager", load_format="dummy", **more))


def in_process() -> dict[str, Any]:
    """Time pushes into an engine of this process, and what they are made of."""
    common.prepare()
    import torch

    from qerl_sync.config import SyncConfig
    from qerl_sync.session import SyncSession
    from qerl_sync.sources.hf import HFSource
    from qerl_sync.transports.inproc import InProcessTransport
    from qerl_sync.worker.compat import engine as compat

    model = trainer()
    source = HFSource(model)
    names = [meta.name for meta in source.metadata()]
    rows = Rows(sum(meta.nbytes for meta in source.metadata()))
    llm = start(model)
    parts = compat.in_process_parts(llm)
    tensors = dict(source.materialize(names))
    places = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            places[name].copy_(tensor)

    def load() -> None:
        with compat.loading_context(parts.vllm_config), parts.device:
            parts.model.load_weights(iter(tensors.items()))

    def reload() -> None:
        with compat.loading_context(parts.vllm_config), parts.device:
            compat.begin_reload(parts.model)
            parts.model.load_weights(iter(tensors.items()))
            compat.finish_reload(parts.model, parts.vllm_config)

    rows.time("copy on the device", copy)
    places.clear()
    if common.device() == "cuda":  # CPU kernels pack weights elsewhere
        rows.time("vLLM's load_weights alone", load)
    rows.time("vLLM's layerwise reload", reload)
    transport = InProcessTransport(llm)
    for level, options in LEVELS.items():
        rows.push(f"push, {level}", SyncSession(source, transport, SyncConfig.of(**options)))
    return rows.facts


def own_process() -> dict[str, Any]:
    """Time pushes to an engine in a process of its own, over each transport."""
    common.prepare()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    from qerl_sync.build import make_session
    from qerl_sync.config import SyncConfig
    from qerl_sync.sources.hf import HFSource

    model = trainer()
    source = HFSource(model)
    rows = Rows(sum(meta.nbytes for meta in source.metadata()))
    llm = start(model, weight_transfer_config={"backend": "qerl"})
    for kind in ("cuda_ipc", "shm", "tcp"):
        for level in ("unverified", "coverage (default)"):
            try:
                config = SyncConfig.of(transport=kind, timeout_seconds=60.0, **LEVELS[level])
                with make_session(source, config, llm=llm) as session:
                    rows.push(f"push over {kind}, {level}", session)
            except Exception as exc:  # noqa: PERF203  the other transports have rows too
                words = f"{type(exc).__name__}: {str(exc)[:300]}"
                rows.facts["rows"].append({"what": f"push over {kind}, {level}", "error": words})
                report.keep(rows.facts)
    return rows.facts


def copies() -> dict[str, Any]:
    """Time copies between host and device: what bounds a transport through the host's memory."""
    common.prepare()
    import torch

    nbytes = 2**30 if common.device() == "cuda" else 2**24
    rows = Rows(nbytes)
    device = torch.empty(nbytes, dtype=torch.uint8, device=common.device())
    other = torch.empty_like(device)
    rows.time("device to device", partial(other.copy_, device))
    pageable = torch.ones(nbytes, dtype=torch.uint8)
    descriptor = os.memfd_create("qerl-sync-gpu")
    os.ftruncate(descriptor, nbytes)
    shared = torch.frombuffer(mmap.mmap(descriptor, nbytes), dtype=torch.uint8).fill_(1)
    hosts = {"pageable": pageable, "shared": shared}
    if common.device() == "cuda":
        hosts["pinned"] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    for name, host in hosts.items():
        rows.time(f"{name} to device", partial(device.copy_, host), rounds=3)
        rows.time(f"device to {name}", partial(host.copy_, device), rounds=3)
    rows.time("host to host", partial(pageable.copy_, shared), rounds=3)
    if common.device() == "cuda":
        runtime = torch.cuda.cudart()
        begun = time.perf_counter()
        status = runtime.cudaHostRegister(shared.data_ptr(), nbytes, 0)
        rows.facts["register_seconds"] = time.perf_counter() - begun
        rows.facts["register_status"] = str(status)
        rows.time("registered shared to device", partial(device.copy_, shared), rounds=3)
        rows.time("device to registered shared", partial(shared.copy_, device), rounds=3)
        runtime.cudaHostUnregister(shared.data_ptr())
    return rows.facts


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "in-process": in_process,
    "own-process": own_process,
    "copies": copies,
}
COST: dict[str, tuple[float, float]] = {
    "in-process": (20.0, 60.0),
    "own-process": (20.0, 75.0),
    "copies": (4.0, 30.0),
}
