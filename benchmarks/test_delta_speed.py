"""What a sync of changed elements takes, of a full sync: bytes, and time over TCP.

    scripts/bench benchmarks/test_delta_speed.py -s

One element in a hundred changes everywhere, in bfloat16, 28 layers of the shape of Qwen3-0.6B and a
smaller vocabulary. The engine has a process of its own on this machine and is reached over the
loopback, where a full sync is as fast as it can be, and over a link of 1 Gbit/s (a relay that
waits). Full syncs and those of changes take turns; every layer is loaded by vLLM in both.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relay
from support.models import QWEN3_SHAPE, random_model
from transformers import Qwen3Config

from qerl_sync import HFSource, LLMClient, RemoteTransport, SyncConfig, SyncReport, SyncSession
from qerl_sync.bench.echo import EchoWorker
from qerl_sync.bench.transport import start_engine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROUNDS = 3
SHARE = 0.01
LINK_BYTES_PER_SECOND = 125_000_000


@torch.no_grad()
def step(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        flat = parameter.view(-1)
        places = torch.randint(0, flat.numel(), (int(flat.numel() * SHARE),))
        flat[places] *= -1


def slow(data: bytes) -> bytes:
    time.sleep(len(data) / LINK_BYTES_PER_SECOND)
    return data


def show(link: str, full: list[SyncReport], part: list[SyncReport]) -> float:
    """Print a row. Return the share of the bytes that changes take."""
    assert {report.delta["sent"] for report in part if report.delta} == {"elements"}
    seconds = [[r.seconds["total"] for r in some] for some in (full, part)]
    ratio = statistics.median(b / a for a, b in zip(*seconds, strict=True))
    share = part[-1].wire_bytes / full[-1].wire_bytes
    whole, changes = (
        {name: round(s * 1e3) for name, s in some[-1].seconds.items()} for some in (full, part)
    )
    print(
        f"\n{link}: {full[-1].wire_bytes / 1e6:,.0f} MB, changes {share:.1%} of them; "
        f"{statistics.median(seconds[0]):.2f} s and {statistics.median(seconds[1]):.2f} s, "
        f"{ratio:.2f}; mirrors of {part[-1].mirror_bytes / 1e6:,.0f} MB; load average "
        f"{os.getloadavg()[0]:.1f}; ms by phase {whole} and {changes}"
    )
    return share


def measure(
    client: Any, model: torch.nn.Module, **way: Any
) -> tuple[list[SyncReport], list[SyncReport]]:
    """Take turns. Return the reports of full syncs, and of those of changes."""
    reports: dict[str, list[SyncReport]] = {"off": [], "elements": []}
    for _ in range(ROUNDS):
        for delta, found in reports.items():
            transport = RemoteTransport(client, transport="tcp", **way)
            with SyncSession(HFSource(model), transport, SyncConfig.of(delta=delta)) as session:
                session.push()  # connects, plans, and gets the memory
                step(model)
                found.append(session.push())
    return reports["off"], reports["elements"]


@contextmanager
def slow_link() -> Iterator[dict[str, Any]]:
    """Yield the arguments of a transport whose workers are at the other end of such a link."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    between = relay.Relay(port)
    between.to_worker = slow
    yield {"address": relay.HOST, "bind": "127.0.0.1", "port": port}
    between.close()


def test_the_transport_alone() -> None:
    """To a worker that loads nothing, of a third of the layers."""
    model = random_model(Qwen3Config(**{**QWEN3_SHAPE, "num_hidden_layers": 9}), 0, "bfloat16")
    with EchoWorker() as worker:
        assert show("loopback, nothing is loaded", *measure(worker, model)) <= 0.05
        with slow_link() as way:
            assert show("1 Gbit/s, nothing is loaded", *measure(worker, model, **way)) <= 0.05


def test_one_changed_element_in_a_hundred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    model = random_model(Qwen3Config(**QWEN3_SHAPE), 0, "bfloat16")
    model.save_pretrained(tmp_path / "model")
    llm = start_engine(str(tmp_path / "model"))
    fresh = llm.collective_rpc("bench_kernels")
    assert show("loopback", *measure(LLMClient(llm), model)) <= 0.05
    with slow_link() as way:
        assert show("1 Gbit/s", *measure(LLMClient(llm), model, **way)) <= 0.05
    changed = llm.collective_rpc("bench_kernels")
    assert changed != fresh
    with SyncSession(HFSource(model), RemoteTransport(LLMClient(llm)), SyncConfig()) as session:
        session.push()
        assert llm.collective_rpc("bench_kernels") == changed, "not what a full sync brings"
