"""`scripts/trainers`: run the rows that are missing, write docs/trainers.md."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qerl_sync.worker.compat.coupling import vllm_version
from trainers.row import FAILS, TRAINERS, WORKS, WRONG

ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "trainers.json"
PAGE = ROOT / "docs" / "trainers.md"
ROW_SECONDS = 600  # an asynchronous trainer starts a server and a process of its own


def main(words: list[str] | None = None) -> int:
    """Train with each of TRL's trainers that generate with vLLM, each in a process of its own.
    Status 0: no row is wrong or fails."""
    parser = argparse.ArgumentParser(prog="scripts/trainers", description=main.__doc__)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="trainers of that name")
    parser.add_argument("--again", action="store_true", help="also rows that are there already")
    options = parser.parse_args(words)
    rows = _read()
    versions = f"TRL {version('trl')} with vLLM {vllm_version().partition('+')[0]}"
    for name in TRAINERS:
        if fnmatch.fnmatchcase(name, options.only) and (options.again or name not in rows):
            rows[name] = row = {**run_row(name), "versions": versions}
            print(f"{name}: {row['result']} {row['reason']}", flush=True)
            # After each row, so that the next run goes on from here.
            DATA.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
            PAGE.write_text(page())
    return int(any(row["result"] in (WRONG, FAILS) for row in rows.values()))


def run_row(name: str) -> dict[str, Any]:
    """Run a row in a process of its own; whatever ends it is its result."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "row.json"
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        try:
            done = subprocess.run(
                [sys.executable, "-m", "trainers.row", name, str(out)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                capture_output=True,
                text=True,
                timeout=ROW_SECONDS,
            )
            said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            said = f"no end after {ROW_SECONDS} s"
        if out.exists():
            return dict(json.loads(out.read_text()))
    return {"trainer": name, "result": FAILS, "reason": f"the process ended: {said}"[:400]}


def _read() -> dict[str, Any]:
    return dict(json.loads(DATA.read_text())) if DATA.exists() else {}


def page() -> str:
    """Return docs/trainers.md, of all results."""
    rows = _read()
    missing = {"result": "not run", "reason": ""}
    lines = [_line(rows.get(name, {"trainer": name, **missing})) for name in TRAINERS]
    versions = ", ".join(sorted({row["versions"] for row in rows.values()}))
    return INTRODUCTION.format(versions=versions) + "\n".join(lines) + "\n" + NOTES


def _line(row: dict[str, Any]) -> str:
    if row["result"] != WORKS:
        return f"| {row['trainer']} | {row['result']} | – | – | {_cell(row['reason'])} |"
    steps = ", ".join(map(str, row["steps"]))
    return (
        f"| {row['trainer']} | {row['result']}, by `{row['by']}` | {steps} | {row['gap']:.1e} | "
        f"{row['changed']:.2g} |"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


INTRODUCTION = """# TRL's trainers

Written by `scripts/trainers` ({versions}). Each row is a process that trains a tiny
float32 model for three steps with an unmodified trainer. *gap*: by how much a log-probability
of the engine differed from the trainer's own model, at most, after each sync and, colocated,
each time TRL had the engine generate. *before*: the same before a sync, at most; a sync that
did nothing would leave it. *steps*: those at which a sync was made. Nothing here ran on a GPU.

| trainer | | steps | gap | before |
|---|---|---|---|---|
"""

NOTES = """
*works*: synced at each of these steps, and right each time. *refused*: `trainer.train()`, or
the constructor, raises a `ConfigError` before the first step. The asynchronous trainers
generate while they train, by design with weights that are some steps old (their
`max_staleness`), so that only what the server held after each sync is compared. On a CPU their
FLOPS meter and their attention kernel, which need a GPU, were replaced; neither concerns
weights.

How each is attached:

- `WeightSyncCallback` is among the trainer's `callbacks`; see README.md. Subclasses of
  `GRPOTrainer` (GMPO) are served as it is.
- `AsyncWeightTransfer` is the asynchronous trainer's `weight_transfer`; see docs/trl-async.md.
- `OnlineDPOTrainer` drives vLLM by code of its own, and has no object to replace. Train with
  `GRPOTrainer` or `RLOOTrainer`, or leave the callback away and let transformers generate
  (`use_vllm=False`: run). Its own weight sync writes into the engine's kernels, of which nothing
  here holds; on a CPU it fails at the first layer (run: `'Parameter' object has no attribute
  'weight_loader'`).
- `GKDTrainer`, `A2POTrainer`, `TPOTrainer`, `DPOTrainer`, `SFTTrainer` and others do not
  generate with vLLM, and are refused with a sentence that says so. `ServerDistillationTrainer`
  is a `DistillationTrainer` whose teacher is on a server; it was not run.

`IWOPDTrainer` divides its loss by the number of tokens of the dataset's own answers, though it
does not use them: prompts without an answer make its gradients NaN, without vLLM too, and the
next sync refuses such weights.

Not run: a vision-language model under TRL. vLLM's own code for those that TRL trains imports
torchvision, which is not among what is installed here. Their names are those that
`save_pretrained` writes, as for all models, and a whole BLIP-2 is synced exactly without TRL.

tests/trl has what one trainer can be told (`num_iterations`, evaluation, resume, best model,
dtypes), tests/sharded several processes.
"""


if __name__ == "__main__":
    sys.exit(main())
