"""What a sync takes of the device's memory, in several orders: vLLM's own reload, and ours.

The engine starts without weights. The source makes each tensor when it is asked for, as a gather of
shards does, so that whatever the receiver holds is memory of its own.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from gpu import common, report

RELOAD_LOGGER = "vllm.model_executor.model_loader.reload.layerwise"
SEED = "random:1"
SAMPLE_SECONDS = 0.005
# Layers of the large models; without a GPU the proofs' small ones are taken.
LARGE: dict[str, dict[str, Any]] = {
    "dense": {
        "vocab_size": 32768,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "moe": {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 32,
        "moe_intermediate_size": 768,
    },
}
# Through vLLM's reload, as its own two rows are. "?" stands for a third of what the random order
# holds, and no less than the largest layer. The last one is what a user gets who sets nothing.
LAYERWISE = {"load": "layerwise"}
RANDOM = {**LAYERWISE, "source_order": SEED}
OURS: Sequence[tuple[str, dict[str, Any]]] = (
    ("warn, hf", {**LAYERWISE, "policy": "warn"}),
    ("warn, random", {**RANDOM, "policy": "warn"}),
    ("reorder, random", {**RANDOM, "policy": "reorder"}),
    ("budget, random", {**RANDOM, "policy": "reorder", "budget_bytes": "?"}),
    ("spill, random", {**RANDOM, "policy": "spill", "chunk_bytes": "64MiB"}),
    ("defaults, random", {"source_order": SEED}),
)


def run(kind: str, quantization: str | None = None, *, ours: Sequence[str] = ()) -> dict[str, Any]:
    """Measure all orders with one engine. Each row is kept as soon as it is there."""
    common.prepare()
    from vllm import LLM

    from qerl_sync.transports.inproc import InProcessTransport
    from qerl_sync.worker.compat import engine as compat

    large = common.device() == "cuda"
    shape = common.config(kind, **(LARGE[kind] if large else {}))
    source = made_source(shape)
    with tempfile.TemporaryDirectory(prefix="qerl-sync-memory-") as directory:
        shape.architectures = [type(shape).__name__.replace("Config", "ForCausalLM")]
        shape.save_pretrained(directory)
        more = {"kv_cache_memory_bytes": 256 * 2**20} if large else {}
        start = time.perf_counter()
        llm = LLM(
            directory,
            **common.engine_arguments("eager", quantization, load_format="dummy", **more),
        )
    parts = compat.in_process_parts(llm)
    facts: dict[str, Any] = {
        **common.facts(),
        "start_seconds": round(time.perf_counter() - start, 2),
        "sent_gb": sum(meta.nbytes for meta in source.metadata()) / report.GB,
        "quantization": quantization,
        "rows": [],
        "deviations": [],
    }
    meter = Meter(parts.device)
    transport = InProcessTransport(llm)
    held: list[int] = []  # by the orders so far, for a budget between them

    def push(options: dict[str, Any]) -> dict[str, Any]:
        if options.get("budget_bytes") == "?":
            options = {**options, "budget_bytes": max(max(held) // 3, min(held))}
        found = push_once(source, transport, options)
        held.append(found["peak_pinned_bytes"])
        return found

    def stock(order: str) -> dict[str, Any]:
        return reload_stock(source, parts, order)

    syncs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("vLLM, hf", partial(stock, "hf")),
        ("vLLM, random", partial(stock, SEED)),
    ]
    syncs += [(name, partial(push, o)) for name, o in OURS if not ours or name in ours]
    for name, sync in syncs:
        try:
            source.version += 1
            row = {"sync": name, **meter.measure(sync)}
            wrong = [] if quantization else source.not_arrived(parts.model)
            facts["deviations"] += [f"{name}: {one} is not what was sent" for one in wrong]
            if row.get("prediction_exact") is False:
                facts["deviations"].append(f"{name}: the prediction was not exact")
        except Exception as exc:
            row = {"sync": name, "error": f"{type(exc).__name__}: {str(exc)[:300]}"}
            facts["deviations"].append(f"{name}: {row['error']}")
        facts["rows"].append(row)
        facts["passed"] = not facts["deviations"]
        report.keep(facts)
    return facts


def made_source(shape: Any) -> Any:
    """Return a source of that model's checkpoint, whose tensors are made when asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    from qerl_sync.sources.base import Source
    from qerl_sync.sources.hf import HFSource

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    metas = HFSource(model).metadata()
    device = common.device()

    class MadeSource(Source):
        stable = True
        version = 0

        def metadata(self) -> list[Any]:
            return list(metas)

        def tensor(self, name: str, shape: Sequence[int]) -> torch.Tensor:
            generator = torch.Generator(device).manual_seed(
                zlib.crc32(name.encode()) + self.version
            )
            made = torch.empty(tuple(shape), dtype=torch.bfloat16, device=device)
            return made.normal_(0, 0.02, generator=generator)

        def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
            shapes = {meta.name: meta.shape for meta in metas}
            for name in names:
                yield name, self.tensor(name, shapes[name])

        def not_arrived(self, model: torch.nn.Module) -> list[str]:
            """Of parameters that have the same name and shape on both sides, those that differ."""
            live = {name: p for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
            # CPU kernels keep linear weights packed elsewhere, and vocabularies are padded.
            alike = [m for m in metas if m.name in live and live[m.name].shape == tuple(m.shape)]
            return [
                meta.name
                for meta in alike
                if not torch.equal(live[meta.name].data, self.tensor(meta.name, meta.shape))
            ]

    return MadeSource()


def reload_stock(source: Any, parts: Any, order: str) -> dict[str, Any]:
    """Reload as vLLM does by itself, from the same source in that order."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    from qerl_sync.plan.orders import parse_order
    from qerl_sync.worker.compat import engine as compat

    names = [meta.name for meta in parse_order(order)(source.metadata())]
    with compat.loading_context(parts.vllm_config), parts.device:
        initialize_layerwise_reload(parts.model)
        parts.model.load_weights(source.materialize(names))
        finalize_layerwise_reload(parts.model, parts.vllm_config.model_config)
    return {}


def push_once(source: Any, transport: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Push in a session of its own. The transport stays open."""
    from qerl_sync.config import SyncConfig
    from qerl_sync.session import SyncSession

    session = SyncSession(source, transport, SyncConfig.of(**options))
    done = session.push(step=source.version)
    assert session.plan is not None
    assert session.layer_map is not None
    return {
        "predicted_gb": predicted_bytes(session.plan, session.layer_map) / report.GB,
        "peak_pinned_bytes": done.peak_pinned_bytes_predicted,
        "pinned_gb_predicted": done.peak_pinned_bytes_predicted / report.GB,
        "pinned_gb_measured": done.peak_pinned_bytes_measured / report.GB,
        "open_layers": done.max_open_layers_measured,
        "prediction_exact": done.prediction_exact,
        "staged_gb": done.peak_staged_bytes_measured / report.GB,
        "push_seconds": {phase: round(s, 4) for phase, s in done.seconds.items()},
    }


def predicted_bytes(plan: Any, layer_map: Any) -> int:
    """Return the plan's peak of pinned bytes, with the second copy that vLLM makes of a layer when
    it is whole."""
    left = {path: layer.expected_numel for path, layer in layer_map.layers.items()}
    most = 0
    for step in plan.predicted.steps:
        working = 0
        for contribution in layer_map.contributions[step.name]:
            path = contribution.parent_layer
            left[path] -= contribution.loaded_numel
            if left[path] <= 0:
                working += 2 * int(layer_map.layers[path].total_numel)
        most = max(most, step.pinned_bytes + working)
    return most


class Meter:
    """The most memory that a sync takes, by torch's allocator and by the driver; its seconds; and
    what vLLM says of it."""

    def __init__(self, device: Any) -> None:
        from qerl_sync.worker.load.memory import PeakMemory

        self._device, self._peak = device, PeakMemory(device)

    def measure(self, sync: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        import gc

        gc.collect()
        self._synchronize(empty=True)
        with warnings_of_vllm() as said, DriverMemory() as driver:
            self._peak.start()
            start = time.perf_counter()
            found = sync()
            self._synchronize()
            seconds = time.perf_counter() - start
            extra = self._peak.extra_bytes()
        figures = [float(r.args[0]) for r in said if r.args and "Allocating" in r.msg]  # type: ignore
        return {
            "extra_gb": None if extra is None else extra / report.GB,
            "driver_gb": driver.extra_bytes / report.GB,
            **found,
            "vllm_warns_of_mb": max(figures, default=0.0),
            "warning": max(
                (r.getMessage() for r in said if "Allocating" in r.msg),
                key=lambda text: float(text.split()[1]),
                default="",
            ),
            "seconds": seconds,
        }

    def _synchronize(self, empty: bool = False) -> None:
        import torch

        if self._device.type == "cuda":
            torch.cuda.synchronize()
            if empty:
                torch.cuda.empty_cache()


class DriverMemory(threading.Thread):
    """Ask the driver, every few milliseconds, how much of the card is in use. 0 without pynvml."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ended, self._used, self._most, self._before = threading.Event(), None, 0, 0
        with contextlib.suppress(Exception):
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(0)
            self._used = lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)

    @property
    def extra_bytes(self) -> int:
        return max(self._most - self._before, 0)

    def __enter__(self) -> DriverMemory:
        if self._used is not None:
            self._before = self._most = self._used()
            self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        if self._used is not None:
            self.join()

    def run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self._most = max(self._most, self._used())


@contextlib.contextmanager
def warnings_of_vllm() -> Iterator[list[logging.LogRecord]]:
    """Yield what vLLM's reload logs, also what it has said before and would not say again."""
    from vllm import logger as vllm_logger

    said: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = said.append  # type: ignore[method-assign]
    logger = logging.getLogger(RELOAD_LOGGER)
    before = logger.level, logger.propagate
    once = getattr(vllm_logger, "_print_warning_once", None)
    if hasattr(once, "cache_clear"):
        once.cache_clear()
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "dense": partial(run, "dense"),
    "moe": partial(run, "moe", ours=("warn, hf", "warn, random", "reorder, random")),
    "dense-fp8": partial(run, "dense", "fp8", ours=("warn, random", "reorder, random")),
}
COST: dict[str, tuple[float, float]] = {
    "dense": (40.0, 80.0),
    "moe": (25.0, 50.0),
    "dense-fp8": (35.0, 60.0),
}
