"""The same faults against vLLM's own reload: initialise, load, finish, in the same harness."""

from __future__ import annotations

from typing import Any

from support.worker_extension import unfinished

from faults import outcomes as end
from faults.cases import Case
from faults.engines import NEW, OLD, InProcess
from faults.outcomes import STOCK, Outcome, one_line
from faults.triggers import Trigger
from qerl_sync.engines.llm import LLMClient
from qerl_sync.worker.compat import engine as compat


def judge(engine: InProcess, case: Case) -> Outcome:
    """Return an outcome whose `healed` is whether vLLM's next full reload is exactly right."""
    outcome = Outcome(str(engine.spec), case.name, STOCK, expected=case.expected)
    assert case.stock is not None
    pairs, spoil = case.stock(engine)
    outcome.error = _reload(engine, spoil(iter(pairs), Trigger()) if spoil else iter(pairs))
    outcome.ended, outcome.after = _classify(engine)
    LLMClient(engine.llm).pause("abort")
    outcome.note = _reload(engine, iter(engine.pairs))
    outcome.healed = not outcome.note and _is_right(engine, NEW)
    return outcome


def mend(engine: InProcess) -> bool:
    """Go back to version OLD, by our own means, for the next case. Returns whether that worked."""
    LLMClient(engine.llm).pause("abort")
    compat.restore(engine.model)
    engine.push(OLD)
    compat.zero_kv_caches(engine.parts.vllm_config)
    return _is_right(engine, OLD)


def _reload(engine: InProcess, stream: Any) -> str:
    """Do what vLLM's documentation tells a trainer to do. Returns what it raised, or ""."""
    model, vllm_config = engine.model, engine.parts.vllm_config
    try:
        with compat.loading_context(vllm_config):
            compat.begin_reload(model)
            model.load_weights(stream)
            compat.finish_reload(model, vllm_config)
        engine.llm.reset_prefix_cache()
    except Exception as exc:
        return one_line(exc)
    return ""


def _classify(engine: InProcess) -> tuple[str, str]:
    how, words = engine.answer()
    if how != "answers":  # it tells nobody why, but it does not serve
        return f"unusable ({words.partition(':')[0]})", how
    version = None if unfinished(engine.model) else engine.version_held()
    if version is None or not engine.generates_as(version):
        return end.WRONG, how
    return (end.HOLDS_NEW if version == NEW else end.HOLDS_OLD), how


def _is_right(engine: InProcess, version: int) -> bool:
    try:
        exact = not unfinished(engine.model) and engine.version_held() == version
        return exact and engine.generates_as(version)
    except Exception:
        return False
