"""A process that breaks one engine: `python -m faults.host`, a line of JSON each outcome.

Lines go to a descriptor of their own; what vLLM prints goes elsewhere.
"""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import oracle
from faults import stock as vllm
from faults.cases import Case, all_cases
from faults.engines import FaultEngine, Spec
from faults.outcomes import OURS, Outcome, one_line


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    told = json.loads(sys.argv[1])
    with (
        os.fdopen(told.pop("output"), "w") as output,
        tempfile.TemporaryDirectory(prefix="qerl-sync-faults-") as directory,
    ):

        def say(**line: Any) -> None:
            print(json.dumps(line), file=output, flush=True)

        engine = Spec.parse(told.pop("spec")).start(Path(directory))
        try:
            _serve(engine, say, **told)
        finally:
            engine.close()


def _end_with_parent() -> None:
    """Whoever started this keeps the other end of its input open. Engines end too: they are in the
    group of processes that this one leads."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _serve(
    engine: FaultEngine,
    say: Callable[..., None],
    cases: list[str] | None = None,
    by: str = OURS,
    **schedules: int,
) -> None:
    if cases is None:
        from faults.schedules import run_schedules

        say(ready=True)
        say(schedules=run_schedules(engine, **schedules))
        return
    # Versions are each case's to judge.
    assert oracle.heals(engine, oracle.VersionWatch(engine)), "syncs without a fault are not exact"
    say(ready=True)
    for name in cases:
        say(begin=name)
        outcome, goes_on = _judge(engine, all_cases()[name], by)
        say(outcome=outcome.to_json())
        if not goes_on:  # its state is not known: the next case gets a new engine
            return


def _judge(engine: Any, case: Case, by: str) -> tuple[Outcome, bool]:
    try:
        if by != OURS:
            return vllm.judge(engine, case), vllm.mend(engine)
        outcome = oracle.judge(engine, case)
        return outcome, bool(outcome.healed)
    except Exception as exc:
        traceback.print_exc()
        spec, error = str(engine.spec), one_line(exc)
        return Outcome(spec, case.name, by, error=error, healed=False), False


if __name__ == "__main__":
    main()
