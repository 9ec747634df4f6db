"""One architecture: real engines, five syncs and vLLM's own reload, held against fresh engines.

A program of its own, as an engine leaves its process changed: `python -m conformance.row NAME`.
"""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

import json
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from support.engines import (
    ENGINE_ARGUMENTS,
    NEW,
    OLD,
    PROMPTS,
    generate,
    kernels_in_use,
    model_of,
    start_engine,
)
from support.fingerprint import difference, fingerprint

from conformance.families import random_model
from conformance.processors import picture_prompts, save
from qerl_sync import HFSource, InProcessTransport, SyncConfig, SyncError, SyncSession
from qerl_sync.worker.compat import engine as compat

_DIRECTORIES = re.compile(r"/\S*/site-packages/")
EXACT, REFUSED, WRONG, NO_START = "exact", "refused", "wrong", "does not start"

# Each goes to the version that the engine does not hold, in a stream as a trainer might send it.
SYNCS: list[tuple[str, dict[str, Any]]] = [
    ("checkpoint order", {"policy": "warn"}),
    ("random order", {"policy": "warn", "source_order": "random:1"}),
    ("reordered", {"policy": "reorder", "source_order": "random:2"}),
    ("spill", {"policy": "spill", "source_order": "random:3"}),
    ("chunks", {"policy": "reorder", "chunk_bytes": "64KiB", "verify": "checksum"}),
]


def run(architecture: str, kernels: str, directory: Path) -> dict[str, Any]:
    """Return the row of that architecture."""
    row: dict[str, Any] = {"architecture": architecture, "kernels": kernels}
    try:
        trainers = {seed: random_model(architecture, seed) for seed in (OLD, NEW)}
        paths = {seed: directory / str(seed) for seed in trainers}
        arguments = {}
        for seed, trainer in trainers.items():
            arguments = save(trainer, paths[seed])
        arguments |= ENGINE_ARGUMENTS[kernels]
        engines = {seed: start_engine(path, **arguments) for seed, path in paths.items()}
        if arguments.get("skip_tokenizer_init", True):
            shown = []
        else:
            shown, row["pictures"] = picture_prompts(engines[OLD])
        answers = {seed: generate(engine, more=shown) for seed, engine in engines.items()}
        # Only now, since some models cast their rotary cache when they first use it.
        weights = {seed: fingerprint(model_of(engine)) for seed, engine in engines.items()}
    except Exception as exc:
        reason = one_line(_cause(exc, architecture))
        return {**row, "ours": NO_START, "stock": NO_START, "reason": reason}
    row["gap"] = _gap(trainers[NEW], answers[NEW][: len(PROMPTS)])
    if not difference(weights[OLD], weights[NEW]):
        return {**row, "ours": NO_START, "stock": NO_START, "reason": "both versions are the same"}

    engine, held = engines[OLD], OLD

    def judge(version: int) -> str:
        wrong = difference(fingerprint(model_of(engine)), weights[version])
        if wrong:
            return f"{len(wrong)} of {len(weights[version])} tensors differ: {wrong[0]}"
        same = generate(engine, more=shown) == answers[version]
        return "" if same else "other answers from equal weights"

    row["ours"], row["reason"], row["predictions"] = EXACT, "", [0, 0]
    for name, options in SYNCS:
        wanted = OLD if held == NEW else NEW
        source = HFSource(trainers[wanted])
        try:
            session = SyncSession(source, InProcessTransport(engine), SyncConfig.of(**options))
            report = session.push()
        except Exception as exc:
            refused = isinstance(exc, SyncError) and not judge(held)
            row["ours"] = REFUSED if refused else WRONG
            row["reason"] = f"{name}: {one_line(exc)}"
            break
        row["predictions"][0] += report.prediction_exact
        row["predictions"][1] += 1
        found = judge(wanted)
        if found:
            row["ours"], row["reason"] = WRONG, f"{name}: {found}"
            break
        held = wanted

    wanted = OLD if held == NEW else NEW
    row["stock"], row["stock_reason"] = _stock(engine, trainers[wanted], lambda: judge(wanted))
    return row


def _stock(engine: Any, trainer: Any, judge: Any) -> tuple[str, str]:
    """vLLM's own layerwise reload, of the checkpoint's tensors in the checkpoint's order."""
    source = HFSource(trainer)
    names = [meta.name for meta in source.metadata()]
    parts = compat.in_process_parts(engine)
    compat.restore(parts.model)
    try:
        with compat.loading_context(parts.vllm_config):
            compat.begin_reload(parts.model)
            parts.model.load_weights(source.materialize(names))
            compat.finish_reload(parts.model, parts.vllm_config)
        engine.reset_prefix_cache()
        engine.llm_engine.reset_encoder_cache()
        found = judge()
    except Exception as exc:
        return REFUSED, one_line(exc)
    return (WRONG if found else EXACT), found


def _gap(trainer: Any, answers: list[tuple[list[int], list[float]]]) -> float | None:
    """Return how far a fresh engine's log-probabilities are from the trainer's own: the two may
    compute differently, which no sync can mend."""
    try:
        gap = 0.0
        for prompt, (tokens, logprobs) in zip(PROMPTS, answers, strict=True):
            with torch.no_grad():
                logits = trainer(input_ids=torch.tensor([prompt + tokens])).logits[0]
            steps = logits.log_softmax(-1)[len(prompt) - 1 :]
            own = [step[token].item() for step, token in zip(steps, tokens, strict=False)]
            gap = max(gap, *(abs(a - b) for a, b in zip(own, logprobs, strict=True)))
        return gap
    except Exception:  # a trainer that needs other inputs, images for instance
        return None


def _cause(exc: Exception, architecture: str) -> Exception:
    """Return what fails in this process too: vLLM imports a model's class in another one first, and
    does not tell why that failed."""
    from vllm.model_executor.models import ModelRegistry

    try:
        ModelRegistry.models[architecture].load_model_cls()
    except Exception as found:
        return found
    return exc


def one_line(exc: BaseException) -> str:
    """Return the error, and for one without a text the line that failed."""
    text = " ".join(str(exc).split())
    if not text:
        frame = traceback.extract_tb(exc.__traceback__)[-1]
        text = f"{frame.line} ({Path(frame.filename).name})"
    text = _DIRECTORIES.sub("", text)  # of the machine that ran it
    return f"{type(exc).__name__}: {text}"[:400]


def main(architecture: str, kernels: str, out: str) -> None:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory, kernels_in_use(kernels):
        row = run(architecture, kernels, Path(directory))
    row["seconds"] = round(time.perf_counter() - started, 1)
    Path(out).write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
