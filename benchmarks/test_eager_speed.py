"""What a step takes with `sync.when: eager`, with `lazy`, and without any sync.

    scripts/bench benchmarks/test_eager_speed.py -s

GRPO trains 142 million parameters (8 layers of the shape of Qwen3-0.6B) in bfloat16 and saves a
checkpoint after each step, which is the work that an eager sync runs beside; the engine has a
process of its own. One trainer of each kind, in turns. Without a sync the engine keeps generating
with the first weights: a baseline, nothing to train with.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from support.models import QWEN3_SHAPE, random_model
from support.trainers import ENGINE, build_trainer, save_policy, varied
from transformers import Qwen3Config, TrainerCallback

from qerl_sync import WeightSyncCallback

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

STEPS, ROUNDS = 6, 3
LEARNED = 2  # steps after which an eager sync knows how often TRL asks
LIMIT = 1.3  # eager over none; holds on a busy CPU, too


class _StepSeconds(TrainerCallback):
    """Times from the beginning of a step to the beginning of the next."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        now = time.perf_counter()
        if state.global_step > LEARNED:
            self.seconds.append(now - self._begun)
        self._begun = now


def test_an_eager_sync_runs_beside_the_checkpoints(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy")  # for its tokenizer
    shape = {**QWEN3_SHAPE, "num_hidden_layers": 8, "eos_token_id": 1, "pad_token_id": 0}
    random_model(Qwen3Config(**shape), 0, "bfloat16").save_pretrained(policy)
    trainers, clocks, callbacks = {}, {}, {}
    for kind in ("none", "lazy", "eager"):
        callback = callbacks[kind] = WeightSyncCallback(
            when="eager" if kind == "eager" else "lazy",
            engine={**ENGINE, "dtype": "bfloat16"},
            in_own_process=True,
        )
        clock = clocks[kind] = _StepSeconds()
        trainers[kind] = build_trainer(
            policy,
            tmp_path / kind,
            [callback, clock],
            reward=varied,
            optim="sgd",
            max_steps=STEPS,
            save_strategy="steps",
            save_steps=1,
            save_only_model=True,
            save_total_limit=1,
            model_init_kwargs={"dtype": "bfloat16"},
        )
        if kind == "none":
            trainers[kind].vllm_generation.sync_weights = lambda: None
            callback._may_be_stale = lambda: False  # type: ignore[method-assign]
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for kind, trainer in trainers.items():
            trainer.train()
            seconds[kind] += clocks[kind].seconds
            clocks[kind].seconds.clear()
    for callback in callbacks.values():
        callback.close()
    syncs = [one.seconds for one in callbacks["eager"].reports if "waited" in one.seconds]
    assert len(syncs) == ROUNDS * (STEPS - LEARNED)
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    for kind, found in medians.items():
        ratio = found / medians["none"]
        print(f"\n{kind:6}{found * 1e3:8.0f} ms a step, {ratio:.2f} of that without a sync", end="")
    total, waited = (statistics.median(one[name] for one in syncs) for name in ("total", "waited"))
    print(f"\nan eager sync takes {total * 1e3:.0f} ms; waited for: {waited * 1e3:.0f} ms")
    assert medians["eager"] / medians["none"] <= LIMIT
