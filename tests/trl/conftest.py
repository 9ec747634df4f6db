"""One policy, and one engine for each kind of engine arguments, for all trainers of these tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.trainers import save_policy

from qerl_sync.integrations.trl import COMPUTING


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def engines() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def shared_engines(engines: dict[str, Any]) -> Iterator[None]:
    """Give trainers the engine that an earlier one had, with whatever weights that has left.

    TRL sets RANK, MASTER_PORT and others, which programs that other tests start would follow: they
    are taken back.
    """
    from trl.generation import vllm_generation

    environment, make = dict(os.environ), vllm_generation.LLM

    def shared(**given: Any) -> Any:
        given["max_num_seqs"] = 16  # TRL's goes by the batch
        place = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING")
        key = repr([place, *sorted(given.items(), key=str)])
        if key not in engines:
            engines[key] = make(**given)
        for name in set(vars(engines[key])) & set(COMPUTING):
            delattr(engines[key], name)  # the guard of an earlier callback
        return engines[key]

    vllm_generation.LLM = shared
    yield
    vllm_generation.LLM = make
    os.environ.clear()
    os.environ.update(environment)
