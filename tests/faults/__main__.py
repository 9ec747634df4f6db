"""`scripts/faults`: does qerl-sync keep its promises here?"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from faults.outcomes import Outcome
from faults.suite import chosen_specs, run_random, run_suite
from faults.tables import complaints, fault_page, fault_table
from qerl_sync import ConfigError, SyncError, __version__
from qerl_sync.worker.compat.coupling import vllm_version

# Exit codes, as those of `qerl-sync`.
BROKEN, REFUSED = 1, 2


def main(words: list[str] | None = None) -> int:
    """Break syncs of real engines on purpose. Status 0: every case ended as it should."""
    options = _parser().parse_args(words)
    console = Console(stderr=options.json, soft_wrap=True, highlight=False)
    try:
        with tempfile.TemporaryDirectory() as directory:
            log = options.log or Path(directory) / "engines.log"
            return (_schedules if options.random else _cases)(options, log, console)
    except SyncError as exc:
        if options.debug:
            raise
        print(f"error: {exc}", file=sys.stderr)
        return REFUSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/faults", description=main.__doc__)
    add = parser.add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    engines = "only these: an engine, or engine/model/kernels such as 'own process/moe/stock'"
    add("--engine", **several, help=engines)
    add("--case", **several, help="only cases of this name; * stands for anything")
    add("--stock", action="store_true", help="break vLLM's own reload in the same ways, beside")
    schedules = (
        "instead: this many random schedules of faults and syncs, without SIGKILL and SIGSTOP"
    )
    add("--random", type=int, default=0, metavar="NUMBER", help=schedules)
    add("--seed", type=int, default=0, help="of the random schedules")
    add(
        "--read",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="run nothing: show the cases that runs with --json have printed into these files",
    )
    add("--docs", type=Path, metavar="FILE", help="write the page docs/faults.md here")
    add("--log", type=Path, metavar="FILE", help="where the engines' output goes")
    add("--json", action="store_true", help="print JSON")
    add("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _cases(options: argparse.Namespace, log: Path, console: Console) -> int:
    def note(text: str) -> None:
        console.print(text, markup=False)

    if options.read:
        versions, outcomes = _read(options.read)
    else:
        specs = chosen_specs(options.engine)
        patterns = options.case or ["*"]
        outcomes = list(run_suite(specs, patterns, log, stock=options.stock, note=note))
        names = [f"{name} {version(name)}" for name in ("torch", "transformers")]
        versions = ", ".join([f"qerl-sync {__version__}", f"vLLM {vllm_version()}", *names])
    if options.json:
        reported = {"versions": versions, "outcomes": [outcome.to_json() for outcome in outcomes]}
        print(json.dumps(reported, indent=2))
    else:
        for by in dict.fromkeys(outcome.by for outcome in outcomes):
            console.print(fault_table(outcomes, by))
    if options.docs is not None:
        options.docs.write_text(fault_page(outcomes, versions))
    wrong = complaints(outcomes)
    for line in wrong:
        note(line)
    return BROKEN if wrong else 0


def _read(files: Sequence[Path]) -> tuple[str, list[Outcome]]:
    """Return the versions that all of the files are of, and their outcomes."""
    runs = [_read_one(path) for path in files]
    versions = {found for found, _ in runs}
    if len(versions) > 1:
        raise ConfigError(f"runs of several versions: {'; '.join(sorted(versions))}")
    return versions.pop(), [outcome for _, outcomes in runs for outcome in outcomes]


def _read_one(path: Path) -> tuple[str, list[Outcome]]:
    try:
        run = json.loads(path.read_text())
        return run["versions"], [Outcome.of_json(outcome) for outcome in run["outcomes"]]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(
            f"{path} does not hold what `scripts/faults --json` prints of a whole run: {exc}"
        ) from exc


def _schedules(options: argparse.Namespace, log: Path, console: Console) -> int:
    """On the first engine: one of this process takes some 0.1 s for a sync."""
    spec = chosen_specs(options.engine)[0]
    console.print(f"{options.random} schedules on {spec}, seed {options.seed}")
    found = run_random(spec, options.random, options.seed, log)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        console.print(
            f"seed {found['seed']}: {found['schedules']} schedules, {found['steps']} steps, "
            f"{found['faults']} faults, {found['syncs']} good syncs: "
            f"{found['failure'] or 'every state was right'}"
        )
    return BROKEN if found["failure"] else 0


if __name__ == "__main__":
    sys.exit(main())
