"""GRPOTrainer with a peft_config: the adapter travels, and TRL's unchanged calls are answered with
it."""

from __future__ import annotations

import pytest
import torch
from support.remote import engine_environment
from support.trainers import ENGINE, build_trainer, gap, gap_now

from qerl_sync import WeightSyncCallback, noise_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("shared_engines")]

EXACT = 1e-5


@pytest.mark.parametrize("in_own_process", [False, True])
def test_grpo_trains_an_adapter(policy, tmp_path, in_own_process):
    from peft import LoraConfig

    callback = WeightSyncCallback(
        engine=ENGINE, in_own_process=in_own_process, on_unchanged="error"
    )
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with engine_environment({}):  # the first engine had vLLM remember that it was in this process
        trainer = build_trainer(
            policy,
            tmp_path / "run",
            [callback],
            peft_config=config,
            max_steps=4,
            learning_rate=0.02,
            save_strategy="steps",
            save_steps=2,
        )
    trainer.train()
    assert gap(trainer.state.log_history) <= EXACT
    first, *later = callback.reports
    assert {report.lora["mode"] for report in callback.reports} == {"adapter"}
    assert first.lora["base"]
    factors = [p for n, p in trainer.model.named_parameters() if "lora_" in n]
    adapter_bytes = sum(p.nbytes for p in factors)
    assert [report.sent_bytes for report in later] == [adapter_bytes] * 3
    assert any(p.abs().max() > 1e-3 for n, p in trainer.model.named_parameters() if "lora_B" in n)
    if not in_own_process:
        assert gap_now(trainer) > 1e-3, "the last step came after the last sync"
        callback.session.push()
        assert gap_now(trainer) <= EXACT
        # PEFT loads the checkpoint's adapter into the same model. The base stays where it is.
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        resumed = callback.reports[4:]
        assert [(r.step, r.sent_bytes) for r in resumed] == [(2, adapter_bytes), (3, adapter_bytes)]
        assert gap(trainer.state.log_history) <= EXACT
    callback.close()


def test_rollouts_have_noise_by_the_runs_steps_and_evaluation_has_none(policy, tmp_path):
    from peft import LoraConfig

    callback = WeightSyncCallback(
        engine=ENGINE, verify="full", noise={"preset": "section-4.1", "intervals": 2}
    )
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with engine_environment({}):
        trainer = build_trainer(
            policy,
            tmp_path / "run",
            [callback],
            peft_config=config,
            max_steps=4,
            learning_rate=0.02,
            seed=11,
            eval_strategy="steps",
            eval_steps=2,
            per_device_eval_batch_size=4,
        )
    norms = {n: p.clone() for n, p in trainer.model.named_parameters() if "layernorm" in n}
    trainer.train()
    # Step, sigma, seed: two clean rollouts; an evaluation, two noisy rollouts, an evaluation.
    said = [(r.step, r.noise["sigma"], r.noise["seed"]) for r in callback.reports]
    assert said == [(0, 0, 11), (1, 0, 11), (2, 0, 11), (2, 5e-2, 11), (3, 5e-2, 11), (4, 0, 11)]
    noisy, clean = callback.reports[-2:]
    assert len(noise_of(noisy)) == 4
    assert noise_of(clean) == {}
    assert max(report.probe_gap for report in callback.reports) < 1e-4
    logged = [log["sync/noise/sigma"] for log in trainer.state.log_history if "loss" in log]
    assert logged == [0, 0, 5e-2, 5e-2]
    after = dict(trainer.model.named_parameters())
    assert norms
    assert all(torch.equal(p, after[n]) for n, p in norms.items())
    assert gap_now(trainer) <= EXACT, "after the evaluation the engine has the clean policy"
    callback.close()
