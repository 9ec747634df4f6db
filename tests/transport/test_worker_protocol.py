"""What vLLM's calls of our engine do on each rank. It is made without vLLM's worker, of real
connections and a model that nobody loads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.loaders import CALLER

from qerl_sync.errors import AgreementError, PeerLostError
from qerl_sync.wire.endpoints import Listener
from qerl_sync.wire.tokens import new_token, proof

pytestmark = pytest.mark.slow  # it imports vLLM

HOST = "127.0.0.1"
MODEL = SimpleNamespace(dtype=torch.float32, quantization=None, max_model_len=64)
SIZES = {
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 1,
    "data_parallel_size": 1,
    "data_parallel_index": 0,
    "enable_expert_parallel": False,
    "local_engines_only": False,
}


def engine(rank: int) -> Any:
    """That of one of two ranks."""
    from qerl_sync.worker.protocol.engine import QerlWeightTransferEngine

    parallel = SimpleNamespace(rank=rank, world_size=2, **SIZES)
    config = SimpleNamespace(parallel_config=parallel, model_config=MODEL, instance_id="test")
    return QerlWeightTransferEngine(None, config, torch.device("cpu"), torch.nn.Linear(1, 1))


@pytest.fixture
def ranks():
    made = [engine(0), engine(1)]
    yield made
    for one in made:
        one.shutdown()


def signed(endpoint: str, token: str = "known") -> dict[str, Any]:
    """A first call as anybody can make it where the workers have no token of their own."""
    shown = proof(token, "init", endpoint)
    return {"endpoints": [endpoint], "token": token, "proof": shown, "session": CALLER}


ODD = [None, 3, "text", [], [{"number": 1}], {}, {1: 2}, {"proof": 3}, b"\xff"]
FIRST_CALLS = [
    *ODD,
    {**signed("host:80"), "proof": "prüf"},
    {**signed("host:80"), "token": "\ud800"},
    signed("a..b:80"),
    signed("x" * 300 + ":80"),
    signed("host:" + "9" * 5000),
    signed("host:\u00b2"),
    signed("\ud800:80"),
]


def call(one: Any, method: str, reported: Any) -> Exception | None:
    """As vLLM's worker makes it: what it raises."""
    try:
        if method == "init":
            one.init_transfer_engine(one.parse_init_info(reported))
        else:
            one.update_weights(reported)
    except Exception as exc:
        return exc
    return None


@pytest.mark.parametrize("reported", FIRST_CALLS, ids=lambda reported: repr(reported)[:40])
def test_only_the_last_rank_refuses_a_first_call(ranks, reported):
    first, last = [call(one, "init", reported) for one in ranks]
    assert first is None
    assert isinstance(last, ValueError)
    assert "does not connect to the trainer: " in str(last)
    assert not isinstance(last, AgreementError)  # it reaches processes without this package


@pytest.mark.parametrize("reported", ODD, ids=repr)
def test_only_the_last_rank_refuses_an_update(ranks, reported):
    first, last = [call(one, "update", reported) for one in ranks]
    assert first is None
    assert "does not take the update: " in str(last)


def test_an_error_that_nobody_has_thought_of_is_named(ranks, monkeypatch, caplog):
    for one in ranks:
        monkeypatch.setattr(one._session, "serve", lambda reported: 1 / 0)
    first, last = [call(one, "update", {}) for one in ranks]
    assert first is None
    assert "ZeroDivisionError: division by zero" in str(last)
    assert "Traceback" in caplog.text


def test_each_rank_knows_whether_vllm_has_its_update_open(ranks):
    """vLLM ends that of a rank that raises."""
    assert [hello.update_open for hello in hellos(ranks)] == [False, False]
    for one in ranks:
        one.start_weight_update()
    assert [hello.update_open for hello in hellos(ranks)] == [True, True]
    for one in ranks:
        call(one, "update", None)
    assert [hello.update_open for hello in hellos(ranks)] == [True, False]
    ranks[0].finish_weight_update()
    assert [hello.update_open for hello in hellos(ranks)] == [False, False]


def test_a_rank_that_cannot_introduce_itself_lets_go_of_the_trainer(ranks, monkeypatch):
    monkeypatch.delattr(MODEL, "max_model_len")
    with pytest.raises(PeerLostError):
        hellos(ranks)


def hellos(ranks: list[Any]) -> list[Any]:
    """What the ranks tell a trainer that connects and says no more."""
    reported = []
    listener = Listener(HOST, 0, token := new_token())
    init = signed(f"{HOST}:{listener.port}", token)
    with closing(listener), ThreadPoolExecutor() as pool:
        for one in ranks:
            calling = pool.submit(call, one, "init", init)
            trainer = listener.accept(10)
            assert trainer is not None
            with trainer:
                reported.append(trainer.receive(10, "its hello"))
            calling.result(timeout=10)
    assert threading.active_count() < 50
    return reported
