"""Trainers as people set them: at every generation the engine has the trainer's weights, or the
training is refused before its first step. All of them share an engine for each of its dtypes."""

from __future__ import annotations

import threading
import time
from itertools import count

import pytest
import torch
from support.trainers import ENGINE, build_trainer, varied
from support.witness import Witness
from transformers import TrainerCallback

from qerl_sync import SyncError, WeightSyncCallback

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("shared_engines")]

# What rounding explains, by the dtype that the engine computes in.
LIMITS = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.03}
LEARNING_RATE = 1e-2


def load(policy, dtype="float32"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy, dtype=dtype)


@pytest.fixture
def train(policy, tmp_path):
    """Build and train, watched. Return the trainer, its callback and the witness."""

    def run(
        model=None,
        engine=None,
        float32=False,
        reward=varied,
        begin=lambda trainer: None,
        when="lazy",
        **changes,
    ):
        callback = WeightSyncCallback(engine=ENGINE | (engine or {}), verify="checksum", when=when)
        witness = Witness(float32=float32)
        with witness.watching():
            witness.trainer = build_trainer(
                policy,
                tmp_path / "run",
                [callback],
                model=model,
                reward=reward,
                **{"max_steps": 3, "learning_rate": LEARNING_RATE} | changes,
            )
            begin(witness.trainer)
            witness.trainer.train()
            # Training has ended, with the best model or the last: it must be the engine's too.
            witness.trainer.evaluate()
        return witness.trainer, callback, witness

    return run


def assert_right(witness, limit=LIMITS["float32"]):
    assert len(witness.generating) >= 4
    assert max(witness.generating) <= limit
    assert max(witness.after) <= limit
    assert max(witness.before) > 3 * limit, "no step has changed what the engine should say"


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
        {"gradient_accumulation_steps": 2, "num_iterations": 2, "eval_strategy": "steps"}
        | {"eval_steps": 1},
    ],
    ids=["gradient_checkpointing", "torch_compile", "sync_ref_model", "eval between iterations"],
)
def test_what_trl_can_be_told_leaves_the_engine_right(train, changes):
    _, callback, witness = train(**changes)
    assert_right(witness)
    assert all(report.prediction_exact for report in callback.reports)


@pytest.mark.parametrize(
    ("changes", "ahead"),
    [
        ({"eval_strategy": "steps", "eval_steps": 4, "max_steps": 6}, [2, 3, 4, 5]),
        # Completions at the steps 0, 2, 4, 6: the first two tell how often they are made.
        ({"steps_per_generation": 2, "max_steps": 8}, [4, 6]),
    ],
    ids=["each step", "every second step"],
)
def test_eager_syncs_are_there_when_trl_asks(train, changes, ahead):
    _, callback, witness = train(when="eager", **changes)
    assert_right(witness)
    assert [one.step for one in callback.reports if "waited" in one.seconds] == ahead
    # The last is for the evaluation after training, which may have brought back the best model.
    steps = [one.step for one in callback.reports][:-1]
    assert steps == sorted(set(steps)), "a step was synced twice"
    assert all(report.prediction_exact for report in callback.reports)


def test_an_eager_sync_that_fails_ends_the_training(train):
    def spoil_at_step_2(trainer):
        class Spoil(TrainerCallback):
            def on_optimizer_step(self, args, state, control, model, **others):
                if state.global_step == 1:  # the second step is being made
                    next(model.parameters()).data.fill_(float("nan"))

        trainer.add_callback(Spoil())

    with pytest.raises(SyncError, match="NaN"):
        train(when="eager", max_steps=6, begin=spoil_at_step_2)


def test_an_eager_sync_begins_when_other_callbacks_have_ended_the_step(train, monkeypatch):
    """TRL's self-distillation makes its teacher's adapter the active one for a moment."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from peft import LoraConfig
    from trl.experimental.sdft.teacher_sync import PEFTAdapterEMACallback

    class SlowEMA(PEFTAdapterEMACallback):
        def on_step_end(self, *hook, **others):
            self.model.set_adapter(self.teacher_adapter_name)
            time.sleep(0.5)
            self.model.set_adapter("default")
            super().on_step_end(*hook, **others)

    _, callback, witness = train(
        when="eager",
        begin=lambda trainer: trainer.add_callback(SlowEMA(trainer.model)),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        max_steps=5,
    )
    assert_right(witness)
    assert any("waited" in report.seconds for report in callback.reports)


def test_weights_that_change_under_an_eager_sync_end_the_training(train):
    sending, written, sessions = threading.Event(), threading.Event(), []

    def begin(trainer):
        class Meddle(TrainerCallback):
            def on_log(self, args, state, control, model, **others):
                if state.global_step == 2:  # the first sync that is begun ahead
                    assert sending.wait(60)
                    with torch.no_grad():
                        model.lm_head.weight.mul_(1.5)
                    written.set()

        (callback,) = (c for c in trainer.callback_handler.callbacks if hasattr(c, "session"))
        sessions.append(callback.session)
        source, materialize = callback.session._source, callback.session._source.materialize

        def slow(names):
            if trainer.state.global_step == 2:
                sending.set()
                assert written.wait(60)
            return materialize(names)

        source.materialize = slow
        trainer.add_callback(Meddle())

    with pytest.raises(SyncError, match="written to while the weights were sent"):
        train(when="eager", max_steps=6, begin=begin)
    sessions[0].push()  # the engine is for other tests, too


def test_the_optimizer_waits_for_an_eager_sync(train, monkeypatch):
    trainer, callback, _ = train(when="eager", max_steps=4)
    sent, stepped = threading.Event(), threading.Event()
    push = callback.session.push

    def slow(**options):
        assert sent.wait(60)
        return push(**options)

    monkeypatch.setattr(callback.session, "push", slow)
    hook = (trainer.args, trainer.state, trainer.control)
    trainer.state.max_steps += 1  # as if there were another step to come
    trainer.control.should_training_stop = False
    monkeypatch.setattr(callback._eager, "is_next", lambda step: True)
    callback.on_step_end(*hook)

    def step():
        callback.on_pre_optimizer_step(*hook)
        stepped.set()

    optimizer = threading.Thread(target=step)
    optimizer.start()
    assert not stepped.wait(0.5)
    sent.set()
    optimizer.join(60)
    assert stepped.is_set()
    assert callback.reports[-1].seconds["waited"] > 0


def test_the_best_model_is_what_the_engine_evaluates(train):
    """It is another than the last: rewards fall."""
    calls = count()

    def falling(completions, **columns):
        return [-float(next(calls)) for _ in completions]

    trainer, callback, witness = train(
        reward=falling,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
    )
    assert trainer.state.best_global_step == 1
    assert_right(witness)
    assert witness.before[-1] > 1e-3, "the engine had the last step's weights"
    assert callback.reports[-1].step == 3


def test_the_best_model_is_loaded_after_an_eager_sync(train):
    """Training is stopped by a callback that is called after ours, which has begun a sync."""
    torn = []

    def stop_after_step_3(trainer):
        callback = next(
            one for one in trainer.callback_handler.callbacks if isinstance(one, WeightSyncCallback)
        )
        push = callback.session.push

        def slow(*, step, clean):
            def weights():
                return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

            before = weights()
            time.sleep(3.0 * (step == 3))
            report = push(step=step, clean=clean)
            torn.append((step, not torch.equal(weights(), before)))
            return report

        callback.session.push = slow

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **others):
                control.should_training_stop = state.global_step == 3

        trainer.add_callback(Stop())

    trainer, _, witness = train(
        when="eager",
        begin=stop_after_step_3,
        max_steps=8,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
    )
    assert trainer.state.best_global_step == 2
    assert (3, False) in torn
    assert not any(changed for _, changed in torn)
    assert witness.after[-1] <= LIMITS["float32"]


def test_evaluating_first_syncs_what_differs_from_the_checkpoint(train, policy):
    """A model object that is no longer what it was loaded from; the engine loads its path."""
    model = load(policy)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    _, callback, witness = train(model, begin=lambda trainer: trainer.evaluate())
    assert_right(witness)
    assert witness.before[0] > 1e-2
    assert [report.step for report in callback.reports[:2]] == [0, 0]


@pytest.mark.parametrize(
    ("trainer", "engine", "limit", "changes"),
    [
        # The engine computes in float32 with the bfloat16 values: as exact as with float32 ones.
        ("bfloat16", "float32", "float32", {}),
        ("float32", "bfloat16", "bfloat16", {}),
        ("float32", "float16", "float16", {}),
        ("float16", "float32", "float32", {}),
        # Mixed precision: the weights stay float32, whatever the trainer computes in.
        ("float32", "float32", "float32", {"bf16": True}),
    ],
)
def test_dtypes_of_trainer_and_engine_may_differ(train, policy, trainer, engine, limit, changes):
    model = load(policy, trainer)
    # In float16 Adam's second moments are zeros, and its usual epsilon is too.
    _, _, witness = train(model, {"dtype": engine}, float32=True, adam_epsilon=1e-3, **changes)
    assert_right(witness, LIMITS[limit])


def test_embeddings_that_grew_are_refused_before_the_first_step(train, policy):
    """vLLM loads the checkpoint of the model's path, with embeddings of the old size."""
    model = load(policy)
    model.resize_token_embeddings(320)
    steps = []
    with pytest.raises(SyncError) as raised:
        train(model, begin=lambda trainer: steps.append(trainer))
    print(type(raised.value), raised.value)
    assert not any(trainer.state.global_step for trainer in steps)
    assert "embed_tokens" in str(raised.value)


def test_an_engine_that_cannot_sleep_is_refused(train):
    """vLLM's sleep mode needs a GPU."""
    with pytest.raises(Exception, match="leep"):
        train(vllm_enable_sleep_mode=True)
