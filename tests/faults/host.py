"""A process that breaks one engine.

It is told over a pipe what to do, and sends each case's name before it and its outcome after it; or
the error that ends it.
"""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from faults import oracle
from faults import stock as vllm
from faults.cases import Case, all_cases
from faults.engines import FaultEngine
from faults.outcomes import OURS, Ended, Outcome, one_line


def main(pipe: Connection) -> None:
    os.setsid()
    spec, reported = pipe.recv()
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        with tempfile.TemporaryDirectory(prefix="qerl-sync-faults-") as directory:
            engine = spec.start(Path(directory))
            try:
                _serve(engine, pipe.send, **reported)
            finally:
                engine.close()
    except Exception as exc:
        # What engines write as they end hides the traceback in the log.
        pipe.send(Ended(one_line(exc)))
        raise


def _end_with_parent(pipe: Connection) -> None:
    """Engines end too: they are in the group of processes that this one leads."""
    with suppress(EOFError, OSError):
        pipe.recv()
    os.killpg(0, signal.SIGKILL)


def _serve(
    engine: FaultEngine,
    say: Callable[[Any], None],
    cases: list[str] | None = None,
    by: str = OURS,
    **schedules: int,
) -> None:
    if cases is None:
        from faults.schedules import run_schedules

        say("ready")
        say(run_schedules(engine, **schedules))
        return
    # Versions are each case's to judge.
    assert oracle.heals(engine, oracle.VersionWatch(engine)), "syncs without a fault are not exact"
    say("ready")
    for name in cases:
        say(name)
        outcome, goes_on = _judge(engine, all_cases()[name], by)
        say(outcome)
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
