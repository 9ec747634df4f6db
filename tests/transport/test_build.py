"""Which transport leads to which engine, and what leads nowhere."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qerl_sync.build import make_transport
from qerl_sync.config import SyncConfig
from qerl_sync.errors import ConfigError
from qerl_sync.transports.inproc import InProcessTransport
from qerl_sync.transports.remote import RemoteTransport

URL = "http://127.0.0.1:8000"


def llm(*, in_process: bool, backend: str | None):
    """As much of a `vllm.LLM` as says where its engine is and how weights get there."""
    transfer = backend and SimpleNamespace(backend=backend)
    config = SimpleNamespace(weight_transfer_config=transfer)
    executor = object() if in_process else None
    return SimpleNamespace(llm_engine=SimpleNamespace(model_executor=executor, vllm_config=config))


@pytest.mark.parametrize("transport", ["auto", "shm", "tcp"])
@pytest.mark.parametrize(
    "engine",
    [{"server_url": URL}, {"llm": llm(in_process=False, backend="qerl")}],
    ids=["server", "own process"],
)
def test_engines_in_other_processes_are_reached_remotely(engine, transport):
    made = make_transport(SyncConfig(transport=transport), **engine)
    assert isinstance(made, RemoteTransport)
    made.close()  # nothing was opened yet


def test_an_engine_in_this_process_can_be_reached_remotely_if_it_was_made_so():
    made = make_transport(SyncConfig(transport="shm"), llm=llm(in_process=True, backend="qerl"))
    assert isinstance(made, RemoteTransport)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["auto", "inproc"])
def test_an_engine_in_this_process_gets_tensors_by_reference(subject, transport):
    made = make_transport(SyncConfig(transport=transport), llm=subject("dense").engine)
    assert isinstance(made, InProcessTransport)


NOWHERE = {
    "inproc to a server": (
        "inproc",
        {"server_url": URL},
        rf"sync\.transport: 'inproc' .* is a server \({URL}\); choose auto, shm or tcp",
    ),
    "inproc to another process": (
        "inproc",
        {"llm": llm(in_process=False, backend="qerl")},
        "'inproc' .* the engine has a process of its own; choose auto, shm or tcp",
    ),
    "shm to an engine in this process that does not receive": (
        "shm",
        {"llm": llm(in_process=True, backend=None)},
        r"'shm' needs .* it has none; .*\"backend\": \"qerl\".* choose sync\.transport auto",
    ),
    "an engine in another process that does not receive": (
        "auto",
        {"llm": llm(in_process=False, backend=None)},
        "'auto' needs .* it has none; .*VLLM_ENABLE_V1_MULTIPROCESSING=0",
    ),
    "vLLM's own backend": (
        "tcp",
        {"llm": llm(in_process=False, backend="nccl")},
        "'tcp' needs .* backend 'nccl'",
    ),
    "no engine": ("auto", {}, "give either llm or server_url"),
    "two engines": ("auto", {"llm": llm(in_process=True, backend=None), "server_url": URL}, "one"),
    "no address": ("auto", {"server_url": "127.0.0.1:8000"}, "write http://"),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_what_leads_nowhere_names_the_option_its_value_and_the_next_step(case):
    transport, engine, words = NOWHERE[case]
    with pytest.raises(ConfigError, match=words):
        make_transport(SyncConfig(transport=transport), **engine)
