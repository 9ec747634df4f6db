"""The table of TRL's trainers, and one of its rows."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from trainers.__main__ import DATA, PAGE, page, run_row
from trainers.row import (
    REFUSED,
    TRAINERS,
    WORKS,
    async_grpo_lora,
    on_a_cpu,
    save_chatting_policy,
)


def test_the_page_is_that_of_the_results():
    assert PAGE.read_text() == page()
    rows = json.loads(DATA.read_text())
    assert rows.keys() <= TRAINERS.keys()
    assert {row["result"] for row in rows.values()} <= {WORKS, REFUSED}


@pytest.mark.vllm
@pytest.mark.slow
def test_a_trainer_that_no_other_test_builds():
    row = run_row("experimental SDFTTrainer")
    assert (row["result"], row["steps"]) == ("works", [0, 1, 2]), row


@pytest.mark.slow
def test_trls_asynchronous_trainer_merges_no_adapter_for_us(tmp_path, monkeypatch):
    """TRL's own trainer, up to the sync: the base keeps every bit, also where the sync fails."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from qerl_sync.integrations.trl_async import AsyncWeightTransfer

    transfer = AsyncWeightTransfer("http://127.0.0.1:9")
    policy = save_chatting_policy(tmp_path / "policy")
    with on_a_cpu():
        trainer = async_grpo_lora(policy, tmp_path / "run", transfer)
    layers = [one for one in trainer.model.modules() if hasattr(one, "lora_B")]
    for layer in layers:
        layer.base_layer.to(torch.bfloat16)
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    before = [layer.base_layer.weight.clone() for layer in layers]
    merged = []

    class Lost(Exception):
        pass

    def push(step):
        merged.extend(layer.merged for layer in layers)
        raise Lost

    transfer.session = SimpleNamespace(begin_run=lambda *_: None, push=push)
    transfer.bind(trainer)
    with pytest.raises(Lost):
        trainer._sync_weight()
    assert merged == [False] * len(layers)
    assert layers
    assert all(torch.equal(a, b.base_layer.weight) for a, b in zip(before, layers, strict=True))
    trainer.model.merge_adapter()  # still there for others
    assert all(layer.merged for layer in layers)
