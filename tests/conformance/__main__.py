"""`scripts/conformance`: run the rows that are missing, write the table."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.progress import Progress

from conformance import receivers
from conformance.families import LEFT_OUT, architectures
from conformance.row import EXACT, NO_START, REFUSED, WRONG
from qerl_sync.worker.compat.coupling import vllm_version

KERNELS = ("stock", "plain", "bf16")
RANK = {EXACT: 0, REFUSED: 1, NO_START: 1, WRONG: 2}
ROOT = Path(__file__).parents[2]
DATA = ROOT / "docs" / "conformance"
ROW_SECONDS = 600
RECEIVERS = DATA / "receivers"


def main(words: list[str] | None = None) -> int:
    """Sync real engines of every architecture. Status 0: no row is wrong, none got worse."""
    options = _parser().parse_args(words)
    if options.receivers:
        return _run_receivers(options)
    file = DATA / f"vllm-{vllm_version().partition('+')[0]}.json"
    rows = _read(file)
    before = dict(rows)
    known = [name for name in architectures() if name not in LEFT_OUT]
    patterns = options.only or ["*"]
    wanted = [
        (name, kernels)
        for kernels in options.kernels or KERNELS
        for name in known
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        and (options.again or f"{name} {kernels}" not in rows)
    ]
    if not wanted:
        print("every row is there; --again runs them anew", file=sys.stderr)
    with Progress(disable=not sys.stderr.isatty()) as progress:
        for name, kernels in progress.track(wanted, description="architectures"):
            row = run_row(name, kernels)
            rows[f"{name} {kernels}"] = row
            line = f"{name} {kernels}: {row['ours']}, stock vLLM {row['stock']} {row['reason']}"
            print(line, flush=True)
            if not options.dry_run:  # after each row, so that the next run goes on from here
                # Another call may have written others meanwhile.
                rows = {**_read(file), f"{name} {kernels}": row}
                _write(file, rows)
    worse = [
        f"{key}: {before[key]['ours']} before, {row['ours']} now ({row['reason']})"
        for key, row in rows.items()
        if key in before and RANK[row["ours"]] > RANK[before[key]["ours"]]
    ]
    wrong = [f"{key}: wrong ({row['reason']})" for key, row in rows.items() if row["ours"] == WRONG]
    for line in worse + wrong:
        print(line, file=sys.stderr)
    return 1 if worse or wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/conformance", description=main.__doc__)
    several: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--only", **several, metavar="PATTERN", help="architectures of that name")
    parser.add_argument("--kernels", **several, choices=KERNELS, help="only these kernels")
    parser.add_argument(
        "--receivers", action="store_true", help="quantised engines: docs/quantisation.md"
    )
    parser.add_argument("--again", action="store_true", help="also rows that are there already")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    return parser


def _run_receivers(options: argparse.Namespace) -> int:
    """Run the missing rows of docs/quantisation.md. Status 0: none is wrong."""
    version = vllm_version().partition("+")[0]
    file = RECEIVERS / f"vllm-{version}.json"
    rows = _read(file)
    for name in receivers.ROWS:
        patterns = options.only or ["*"]
        asked = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        if not asked or (name in rows and not options.again):
            continue
        row = run_receiver(name)
        rows = {**_read(file), name: row}  # another call may have written others meanwhile
        print(f"{name}: full {row['full']}, adapter {row['adapter']} {row['reason']}", flush=True)
        if not options.dry_run:
            write_rows(file, rows)
            (DATA.parent / "quantisation.md").write_text(receivers.page(receiver_rows()))
    return int(any(WRONG in (row["full"], row["adapter"]) for row in rows.values()))


def receiver_rows() -> dict[str, dict[str, Any]]:
    """Return the rows of docs/quantisation.md by version of vLLM."""
    files = sorted(RECEIVERS.glob("vllm-*.json"))
    return {file.stem.removeprefix("vllm-"): _read(file) for file in files}


def run_receiver(name: str) -> dict[str, Any]:
    failed = {"scheme": name, "full": NO_START, "adapter": NO_START}
    return _run_program(["conformance.receivers", name], failed)


def run_row(name: str, kernels: str) -> dict[str, Any]:
    failed = {"architecture": name, "kernels": kernels, "ours": NO_START, "stock": NO_START}
    return _run_program(["conformance.row", name, kernels], failed)


def _run_program(words: list[str], failed: dict[str, Any]) -> dict[str, Any]:
    """Run a row in a process of its own; whatever ends it is its result."""
    out = Path(os.environ.get("TMPDIR", "/tmp")) / f"conformance-{os.getpid()}.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", *words, str(out)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    # Engines are eager; what models compile all the same takes longer than the row, and no weight.
    eager = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    environment = {**os.environ, **eager, "PYTHONPATH": path}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=ROW_SECONDS
        )
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        said = f"no end after {ROW_SECONDS} s"
    if not out.exists():
        return {**failed, "reason": f"the process ended: {said}"[:400]}
    row = json.loads(out.read_text())
    out.unlink()
    return dict(row)


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.exists() else {}


def write_rows(file: Path, rows: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
    new.replace(file)


def _write(file: Path, rows: dict[str, Any]) -> None:
    write_rows(file, rows)
    (file.parent / "README.md").write_text(page())


def page() -> str:
    """Return docs/conformance/README.md, of all result files."""
    parts = [INTRODUCTION]
    for file in sorted(DATA.glob("vllm-*.json")):
        rows = list(_read(file).values())
        ours, stock = (Counter(row[side] for row in rows) for side in ("ours", "stock"))
        started = len(rows) - ours[NO_START]
        exact = sum(row.get("predictions", [0, 0])[0] for row in rows)
        syncs = sum(row.get("predictions", [0, 0])[1] for row in rows)
        parts.append(
            f"## vLLM {file.stem.removeprefix('vllm-')}\n\n"
            f"{started} of {len(rows)} rows started an engine. qerl-sync: {ours[EXACT]} exact, "
            f"{ours[REFUSED]} refused, {ours[WRONG]} wrong. vLLM's own reload: {stock[EXACT]} "
            f"exact, {stock[REFUSED]} failed, {stock[WRONG]} wrong. Predicted and measured "
            f"buffering were equal in {exact} of {syncs} syncs.\n\n"
            "| architecture | kernels | pictures | qerl-sync | vLLM's reload | reason |\n"
            "|---|---|---|---|---|---|\n"
            + "".join(
                f"| {row['architecture']} | {row['kernels']} | {_cell(row.get('pictures', ''))} | "
                f"{row['ours']} | {row['stock']} | "
                f"{_cell(row['reason'] or row.get('stock_reason', ''))} |\n"
                for row in rows
            )
        )
    return "\n".join(parts)


def _cell(text: str) -> str:
    short = text if len(text) <= 160 else f"{text[:157]}..."
    return short.replace("|", "\\|").replace("<", "&lt;")


INTRODUCTION = """# Which architectures survive a sync

Written by `scripts/conformance`. Each row is a process with two real vLLM engines of one small
random model, loaded from two checkpoints. Five syncs (checkpoint order, random order, reordered,
spilled, in small chunks) bring one engine from one checkpoint to the other and back; after each,
all that its kernels hold, and greedy tokens with their log-probabilities, must equal those of the
engine that was loaded from that checkpoint, to the bit. Afterwards vLLM's own layerwise reload
gets the same tensors in checkpoint order, and is held against the same engine.

*exact*: all of that held. *refused*: an error before the first byte, the engine as it was.
*wrong*: the engine differs, or failed in the middle. *does not start*: vLLM does not load the
random model here.

Kernels: *stock* are vLLM's CPU kernels in float32, which pack weights; *plain* use parameters as
they are, as GPU kernels of unquantised models do; *bf16* are the stock ones in bfloat16. None of
this ran on a GPU (docs/gpu has what did).

*pictures*: *seen* by a model whose answers were compared for a prompt with a picture too, or why it
was shown none; its vision tower's weights were compared in any case. Rows of those that see were
recorded with torchvision, timm, scipy and num2words installed beside vLLM; without torchvision most
of them do not start. vLLM 0.25.1 ran with torch 2.11, the others with torch 2.13. Most rows in
float32 were recorded before tensors were loaded by routes (ARCHITECTURE.md, *Routes*), those in
bfloat16 after; `tests/engine/test_routes.py` ran on all four. In bfloat16 all were run on 0.31, and
some of each kind on the others.
"""


if __name__ == "__main__":
    sys.exit(main())
