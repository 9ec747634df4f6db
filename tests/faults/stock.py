"""The same faults against vLLM's own reload: initialise, load, finish, in the same harness."""

from __future__ import annotations

from typing import Any

from support.reloads import unfinished

from faults import outcomes as end
from faults.cases import Case
from faults.outcomes import Outcome
from faults.subjects import NEW, OLD, InProcess
from faults.triggers import Stream, Trigger
from qerl_sync.worker import compat


def reload(llm: Any, parts: compat.EngineParts, stream: Stream) -> None:
    """What vLLM's documentation tells a trainer to do."""
    with compat.loading_context(parts.vllm_config):
        compat.begin_reload(parts.model)
        parts.model.load_weights(iter(stream))  # type: ignore[operator]
        compat.finish_reload(parts.model, parts.vllm_config)
    llm.reset_prefix_cache()


def run(subject: InProcess, case: Case) -> Outcome:
    """`healed` is here whether vLLM's next full reload is exactly right."""
    outcome = Outcome(str(subject.spec), case.name, "stock vLLM", expected=case.expected)
    assert case.stock is not None
    pairs, spoil = case.stock(subject)
    stream = iter(pairs) if spoil is None else spoil(iter(pairs), Trigger())
    outcome.error = _attempt(subject, stream)
    outcome.ended, outcome.after = _classify(subject, outcome.error)
    compat.drop_requests(subject.llm)
    again = _attempt(subject, subject.tensors[NEW].items())
    outcome.healed = not again and _is_right(subject, NEW)
    outcome.note = again
    return outcome


def mend(subject: InProcess) -> bool:
    """Back to version OLD, by our own means, for the next case. Returns whether that worked."""
    compat.drop_requests(subject.llm)
    compat.restore(subject.parts.model)
    subject.push(OLD)
    compat.zero_kv_caches(subject.parts.vllm_config)
    return _is_right(subject, OLD)


def learn(subject: InProcess) -> None:
    """What version NEW says, from a sync that is exact."""
    subject.push(NEW)
    assert subject.version_held() == NEW
    subject.judge_generation(NEW)
    subject.push(OLD)


def _attempt(subject: InProcess, stream: Any) -> str:
    try:
        reload(subject.llm, subject.parts, stream)
    except Exception as exc:
        return " ".join(f"{type(exc).__name__}: {exc}".split())[:300]
    return ""


def _classify(subject: InProcess, error: str) -> tuple[str, str]:
    open_layers = unfinished(subject.parts.model)
    how, words = subject.answer()
    if how == "answers":
        version = None if open_layers else subject.version_held()
        exact = version is not None and subject.judge_generation(version)
        if exact:
            return (end.NEW if version == NEW else end.OLD), how
        return end.WRONG, how
    # It tells nobody why, but it does not serve.
    return f"unusable ({words.partition(':')[0]})", how


def _is_right(subject: InProcess, version: int) -> bool:
    if unfinished(subject.parts.model):
        return False
    try:
        return subject.version_held() == version and subject.judge_generation(version)
    except Exception:
        return False
