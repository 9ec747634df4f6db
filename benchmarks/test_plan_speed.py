"""`qerl-sync plan` on large mixtures of experts: figures, pictures, the whole command.

    scripts/bench benchmarks/test_plan_speed.py

Only the whole command needs vLLM, once: its layer map comes from the cache after that.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.streams import mixture

from qerl_sync.cli.plan.html import render_page
from qerl_sync.cli.plan.input import PlanInput
from qerl_sync.cli.plan.order_specs import default_orders, resolve_order
from qerl_sync.cli.plan.png import plot_plan
from qerl_sync.cli.plan.run import Outcome
from qerl_sync.cli.plan.scenarios import Transport, scenarios
from qerl_sync.plan.checkpoint import Checkpoint
from qerl_sync.plan.offline_map import OfflineMap

CONFIGS = Path(__file__).parent.parent / "configs" / "models"


@pytest.fixture(scope="module")
def wide() -> Outcome:
    """40 blocks of 512 experts: as large as mixtures of experts get today."""
    metas, layer_map = mixture(61_500, experts=512)
    assert len(metas) > 60_000
    orders = {text: resolve_order(text) for text in default_orders(None)}
    transport = Transport(chunk_bytes=1024**3)
    return Outcome(
        asked=PlanInput("wide", Checkpoint(Path("wide"), None, [], None, None)),
        engine={},
        found=OfflineMap(metas, layer_map, "probe", "0"),
        scenarios=scenarios(metas, layer_map, orders, transport=transport),
        transport=transport,
        assertions=[],
        comparisons=[],
        refused=None,
    )


def test_all_orders_and_policies(benchmark):
    """14 lines of the table for about 18,900 tensors."""
    metas, layer_map = mixture(18_800)
    orders = {text: resolve_order(text) for text in default_orders(None)}
    found = benchmark.pedantic(scenarios, (metas, layer_map, orders), rounds=3)
    assert len(found) == 14
    assert benchmark.stats.stats.min <= 1.5


def test_page_of_60000_parameters(benchmark, wide):
    """What a browser has to hold does not depend on the number of parameters."""
    page = benchmark.pedantic(render_page, (wide,), rounds=1)
    assert benchmark.stats.stats.min <= 12
    size, elements, steps = len(page.encode()), page.count("<"), len(re.findall(r"[VH][\d.]", page))
    print(f"\n{size:,} bytes, {elements:,} elements, {steps:,} path segments", end=" ")
    assert size <= 2_000_000
    assert elements <= 2_000
    assert steps <= 60_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert sum(order["tensors"] for order in data["orders"]) > 7 * 60_000


def test_picture_of_60000_parameters(benchmark, wide):
    benchmark.pedantic(plot_plan, (wide,), rounds=1)
    assert benchmark.stats.stats.min <= 10


@pytest.mark.vllm
def test_the_whole_command():
    """As a user waits for it: the interpreter's start, imports, cached map, 14 lines, causes."""
    command = [sys.executable, "-m", "qerl_sync.cli", "plan", str(CONFIGS / "qwen3-30b-a3b.json")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # the map is cached now
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    print(f"\n{min(seconds):.2f} s", end=" ")
    assert min(seconds) <= 2
