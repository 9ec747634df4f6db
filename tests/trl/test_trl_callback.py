"""The callback in a real, unmodified GRPOTrainer with a real colocated engine."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from support.fingerprint import difference, fingerprint
from support.trainers import build_gold_trainer, build_trainer, gap, gap_now, save_policy

from qerl_sync import ConfigError, SyncConfig, WeightSyncCallback, engine_arguments
from qerl_sync.errors import CompatError

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module", autouse=True)
def environment():
    """TRL sets RANK, MASTER_PORT and others, which programs that other tests start would follow."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def train(policy, tmp_path):
    """Build, bind, train; everything about the run."""

    def run(*, options=None, resume=None, **changes):
        callback = WeightSyncCallback(**(options or {}))
        trainer = build_trainer(policy, tmp_path / "run", [callback], **changes)
        callback.bind(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return SimpleNamespace(trainer=trainer, callback=callback, log=trainer.state.log_history)

    return run


def steps_of(callback):
    return [report.step for report in callback.reports]


def assert_engine_has_the_trainers_weights(run):
    """Sync once more from what the trainer has: nothing may change."""
    from qerl_sync.worker.compat import engine as compat

    model = compat.in_process_parts(run.trainer.vllm_generation.llm).model
    before = fingerprint(model)
    run.callback.session.push()
    assert difference(fingerprint(model), before) == []


def test_syncs_when_trl_says_and_logs_through_trl(train):
    run = train(max_steps=3)
    assert steps_of(run.callback) == [0, 1, 2]
    assert [report.version for report in run.callback.reports] == [1, 2, 3]
    assert all(report.prediction_exact for report in run.callback.reports)
    logged = [entry for entry in run.log if "sync/version" in entry]
    assert [entry["sync/version"] for entry in logged] == [1, 2, 3]
    assert logged[0]["sync/bytes"] == run.callback.session.plan.nbytes
    assert logged[0]["sync/open_layers"] == 1
    assert 0 < logged[0]["sync/seconds/load"] <= logged[0]["sync/seconds/total"]
    assert logged[0]["sync/peak_buffered_bytes"] == logged[0]["sync/peak_buffered_bytes_predicted"]
    assert "sampling/sampling_logp_difference/max" in run.log[0]
    assert gap(run.log) <= 1e-5

    # The engine was last synced before the last optimizer step: evaluation must sync again.
    run.trainer.evaluate()
    assert steps_of(run.callback) == [0, 1, 2, 3]
    assert any("eval_sync/version" in entry or "sync/version" in entry for entry in run.log[-2:])
    assert_engine_has_the_trainers_weights(run)


def test_weights_of_a_lost_engine_are_not_taken_for_current(train, monkeypatch):
    """TRL itself would sync when a step has changed the weights, and not before."""
    run = train(max_steps=1)
    session, generation = run.callback.session, run.trainer.vllm_generation
    syncs = len(run.callback.reports)
    prompts = {"prompts": [[5, 6]], "images": None, "num_generations": 1}
    run.callback._synced_step = run.trainer.state.global_step  # the training's end aside
    generation.generate(**prompts)
    assert len(run.callback.reports) == syncs
    monkeypatch.setattr(type(session._transport), "connected", False)
    generation.generate(**prompts)
    assert len(run.callback.reports) == syncs + 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"gradient_accumulation_steps": 2}, [0, 1, 2, 3]),
        ({"num_iterations": 2}, [0, 2]),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 1}, [0, 2]),
        ({"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}, None),
    ],
    ids=["gradient accumulation", "num_iterations", "steps_per_generation", "eval"],
)
def test_keeps_trls_schedule(train, changes, expected):
    run = train(max_steps=4, **changes)
    assert steps_of(run.callback) == (expected or [0, 1, 2, 3, 4])
    assert gap(run.log) <= 1e-5


def test_resumes_with_versions_moving_forwards(train, tmp_path):
    first = train(max_steps=2, save_strategy="steps", save_steps=2)
    assert first.callback.session.version == 2
    second = train(max_steps=4, resume=str(tmp_path / "run" / "checkpoint-2"))
    assert steps_of(second.callback) == [2, 3]
    assert [report.version for report in second.callback.reports] == [3, 4]
    assert gap(second.log) <= 1e-5


def test_a_second_training_syncs_weights_that_changed_in_between(train):
    """`global_step` starts at 0 again, which TRL would take for weights that it has loaded."""
    run = train(max_steps=1)
    for parameter in run.trainer.model.parameters():
        parameter.data.mul_(1.01)
    run.trainer.train()
    assert steps_of(run.callback) == [0, 0]
    assert gap(run.trainer.state.log_history) <= 1e-5


def test_weights_that_change_without_a_step_reach_whoever_asks_the_engine(train):
    """Also past `VLLMGeneration`, as custom rollouts do."""
    run = train(max_steps=1)
    llm, syncs = run.trainer.vllm_generation.llm, len(run.callback.reports)
    llm.generate([{"prompt_token_ids": [5, 6]}], use_tqdm=False)
    assert len(run.callback.reports) == syncs + 1, "the training has ended: the best model, maybe"
    llm.generate([{"prompt_token_ids": [5, 6]}], use_tqdm=False)
    assert len(run.callback.reports) == syncs + 1
    run.callback.expect_new_weights()
    llm.generate([{"prompt_token_ids": [5, 6]}], use_tqdm=False)
    assert len(run.callback.reports) == syncs + 2


def test_gold_generates_with_current_weights_in_a_second_training(policy, tmp_path, monkeypatch):
    """It remembers the step of its last sync, which is ahead of all steps of the next training."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    callback = WeightSyncCallback()
    trainer = build_gold_trainer(policy, tmp_path, [callback], max_steps=3)
    callback.bind(trainer)
    generation = trainer.vllm_generation
    generate, gaps = generation.generate, []

    def generate_and_measure(*args, **options):
        found = generate(*args, **options)
        gaps.append(gap_now(trainer))
        return found

    generation.generate = generate_and_measure
    trainer.train()
    assert steps_of(callback) == [0, 1, 2]
    trainer.train()
    assert steps_of(callback) == [0, 1, 2, 0, 1, 2]
    assert len(gaps) == 6
    assert max(gaps) <= 1e-5


def test_warns_before_the_first_sync_and_only_once(train, caplog):
    with caplog.at_level("WARNING", logger="qerl_sync"):
        run = train(max_steps=2, options={"policy": "warn", "source_order": "random:0"})
    (warning,) = [r.getMessage() for r in caplog.records if "parent layers at once" in r.message]
    assert "self_attn.qkv_proj (QKVParallelLinear)" in warning
    assert "policy: reorder" in warning
    assert run.callback.reports[0].max_open_layers_measured > 1
    assert gap(run.log) <= 1e-5


def test_records_every_report(policy, tmp_path):
    recorded = []
    callback = WeightSyncCallback(SyncConfig.of(policy="reorder"), recorder=recorded.append)
    trainer = build_trainer(policy, tmp_path, [callback], max_steps=1)
    assert callback.bind(trainer) is callback
    trainer.train()
    assert recorded == callback.reports
    assert len(recorded) == 1


def test_a_callback_that_was_not_bound_says_so(policy, tmp_path):
    trainer = build_trainer(policy, tmp_path, [WeightSyncCallback()], max_steps=1)
    with pytest.raises(ConfigError, match=r"not bound; call `callback\.bind\(trainer\)`"):
        trainer.train()


def colocated(**changes):
    """As much of a trainer as `bind` looks at before it looks at the model and the engine."""
    generation = SimpleNamespace(
        mode="colocate",
        tensor_parallel_size=1,
        enable_sleep_mode=False,
        llm=SimpleNamespace(generate=None),
        generate=None,
        sync_weights=None,
    )
    accelerator = SimpleNamespace(num_processes=1)
    given = {"vllm_generation": generation, "accelerator": accelerator, "model": None}
    rest = {"args": SimpleNamespace(), "state": None, "_metrics": {}}
    trainer = SimpleNamespace(**given, **rest)
    for target in (generation, accelerator):
        for name in changes.keys() & vars(target).keys():
            setattr(target, name, changes[name])
    return trainer


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_processes": 2}, "in 2 processes"),
        ({"tensor_parallel_size": 2}, "tensor parallel size 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_trainers_that_it_cannot_serve_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        WeightSyncCallback().bind(colocated(**changes))


@pytest.mark.parametrize(
    ("attributes", "wanted", "not_wanted"),
    [
        ({"args": SimpleNamespace(use_vllm=False)}, "use_vllm=True", "AsyncWeightTransfer"),
        # OnlineDPOTrainer and its kin: vLLM, without a `vllm_generation`.
        ({"use_vllm": True}, "TRL's own weight sync", "use_vllm=True"),
        ({"weight_transfer": None}, "AsyncWeightTransfer", "use_vllm"),
        ({"args": SimpleNamespace()}, "GRPOTrainer", "use_vllm"),
    ],
    ids=["use_vllm=False", "OnlineDPO", "AsyncGRPO", "SFT"],
)
def test_nobody_is_told_to_set_what_is_set(attributes, wanted, not_wanted):
    with pytest.raises(ConfigError) as raised:
        WeightSyncCallback().bind(SimpleNamespace(**attributes))
    assert wanted in str(raised.value)
    assert not_wanted not in str(raised.value)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *(("trainer", name) for name in ("model", "args", "state", "_metrics")),
        *(("generation", name) for name in ("mode", "generate", "sync_weights", "llm")),
        ("llm", "generate"),
    ],
)
def test_what_trl_has_renamed_is_named(owner, name):
    """A renamed `sync_weights` would be set on the instance, and never be called."""
    import trl

    trainer = colocated()
    generation = trainer.vllm_generation
    delattr({"trainer": trainer, "generation": generation, "llm": generation.llm}[owner], name)
    with pytest.raises(CompatError) as raised:
        WeightSyncCallback().bind(trainer)
    assert raised.value.missing == (name,)
    assert (raised.value.trainer, raised.value.trl) == ("SimpleNamespace", trl.__version__)


def test_options_are_the_fields_of_the_sync_section():
    with pytest.raises(ConfigError, match="polcy"):
        WeightSyncCallback(polcy="reorder")
    with pytest.raises(ConfigError, match="not both"):
        WeightSyncCallback(SyncConfig(), policy="reorder")


def test_the_seam_is_put_back_when_building_fails():
    from trl.generation import vllm_generation

    before = vllm_generation.LLM
    with pytest.raises(RuntimeError, match="building"), engine_arguments(dtype="float32"):
        raise RuntimeError("building failed")
    assert vllm_generation.LLM is before
