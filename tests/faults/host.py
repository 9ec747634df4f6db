"""A process that breaks one engine: `python -m faults.host`, a line of JSON each outcome.

Lines go to a descriptor of their own; what vLLM prints goes elsewhere.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

from faults.outcomes import CRASH, Outcome
from faults.subjects import SUBJECTS, Spec, Subject

READY = "ready"


def main() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    told = json.loads(sys.argv[1])
    with os.fdopen(told["output"], "w") as output:

        def say(**line: Any) -> None:
            print(json.dumps(line), file=output, flush=True)

        spec = Spec.parse(told["subject"])
        with tempfile.TemporaryDirectory(prefix="qerl-sync-faults-") as directory:
            subject = SUBJECTS[spec.engine](spec, Path(directory))
            try:
                _serve(subject, told, say)
            finally:
                subject.stop()


def _end_with_parent() -> None:
    """Whoever started this keeps the other end of its input open. Engines end too: they are in the
    group of processes that this one leads."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _serve(subject: Subject, told: dict[str, Any], say: Any) -> None:
    from faults import judge
    from faults.versions import VersionWatch

    if told["random"]:
        from faults.random import run_schedules

        say(state=READY)
        say(schedules=run_schedules(subject, **told["random"]))
        return
    # Versions are each case's to judge.
    if not judge.heals(subject, VersionWatch(subject)):
        raise AssertionError("syncs without a fault are not exact")
    say(state=READY)
    for name in told["cases"]:
        say(begin=name)
        outcome, goes_on = _run(subject, name, stock=told["stock"])
        say(outcome=outcome.to_json())
        if not goes_on:  # its state is not known: the next case gets a new engine
            return


def _run(subject: Subject, name: str, *, stock: bool) -> tuple[Outcome, bool]:
    from faults import judge
    from faults import stock as vllm
    from faults.cases import all_cases

    case = all_cases()[name]
    try:
        if stock:
            assert subject.spec.engine == "in process"
            outcome = vllm.run(subject, case)  # type: ignore[arg-type]
            return outcome, vllm.mend(subject)  # type: ignore[arg-type]
        outcome = judge.run(subject, case)
        return outcome, bool(outcome.healed)
    except Exception as exc:
        traceback.print_exc()
        text = f"{type(exc).__name__}: {exc}"
        return Outcome(str(subject.spec), name, ended=CRASH, error=text[:300], healed=False), False


if __name__ == "__main__":
    main()
