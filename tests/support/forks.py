"""Processes that begin with torch, vLLM and TRL imported, which takes a core ten seconds: they are
forked from one that has done it for all of them."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Mapping
from importlib import import_module
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any
from unittest import mock

# The first sets what vLLM reads when it is imported. What is not installed is left out.
IMPORTED = [
    "support.environment",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "trl.trainer.grpo_trainer",
    "peft",
    "qerl_sync.integrations.trl",
]


def start_program(program: str, *arguments: Any, log: Path, environment: Mapping[str, str]) -> Any:
    """Start `main(*arguments)` of the module `program`, as a process of its own.

    Args:
        log: where standard output and error are appended.
        environment: all that the process has in it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, {"PYTHONPATH": import_path()}):
        forkserver.ensure_running()
    process = context.Process(target=_run, args=(program, arguments, str(log), dict(environment)))
    process.start()
    return process


def _run(program: str, arguments: Any, log: str, environment: dict[str, str]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    gc.freeze()  # what is imported stays: no collection need look at it
    # As a program's own: what it leaves behind is removed when it ends, not when the tests do.
    resource_tracker._resource_tracker._fd = None
    import_module(program).main(*arguments)


def import_path() -> str:
    """PYTHONPATH with which other processes find the project and its tests' helpers."""
    tests = Path(__file__).parents[1]
    return os.pathsep.join([str(tests.parent), str(tests)])
