"""The callback in a real, unmodified GRPOTrainer with a real colocated engine."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
from support.fingerprint import difference, fingerprint
from support.trainers import (
    ENGINE,
    build_gold_trainer,
    build_trainer,
    gap,
    gap_now,
    save_policy,
)
from transformers import TrainerCallback
from vllm import LLM

from qerl_sync import ConfigError, SyncConfig, WeightSyncCallback, engine_arguments
from qerl_sync.errors import CompatError
from qerl_sync.worker.compat import cpu_segments

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.usefixtures("shared_engines")]


PARTS_OF_ADAPTED = ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down")


@pytest.fixture
def train(policy, tmp_path):
    """Build and train; everything about the run."""

    def run(*, options=None, resume=None, **changes):
        callback = WeightSyncCallback(engine=ENGINE, **(options or {}))
        trainer = build_trainer(policy, tmp_path / "run", [callback], **changes)
        trainer.train(resume_from_checkpoint=resume)
        return SimpleNamespace(trainer=trainer, callback=callback, log=trainer.state.log_history)

    return run


@pytest.fixture
def own_engines(monkeypatch):
    """Have each trainer start an engine."""
    monkeypatch.setattr("trl.generation.vllm_generation.LLM", LLM)


@pytest.fixture(autouse=True)
def nothing_of_trl_stays_replaced():
    before = patched()
    yield
    assert patched() == before


def patched():
    """What a trainer that is built may find replaced."""
    from trl.generation import vllm_generation
    from trl.generation.vllm_client import VLLMClient

    init_vllm = vllm_generation.VLLMGeneration._init_vllm
    return init_vllm, vllm_generation.LLM, VLLMClient.init_communicator


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
    versions = [report.version for report in run.callback.reports]
    assert versions == [versions[0] + step for step in (0, 1, 2)]
    assert all(report.prediction_exact for report in run.callback.reports)
    logged = [entry for entry in run.log if "sync/version" in entry]
    assert [entry["sync/version"] for entry in logged] == versions
    assert logged[0]["sync/bytes"] == run.callback.session.plan.nbytes
    assert logged[0]["sync/open_layers"] == 1
    assert 0 < logged[0]["sync/seconds/load"] <= logged[0]["sync/seconds/total"]
    assert logged[0]["sync/peak_buffered_bytes"] == logged[0]["sync/peak_buffered_bytes_predicted"]
    assert "sampling/sampling_logp_difference/max" in run.log[0]
    assert gap(run.log) <= 1e-5
    vllm = run.trainer.vllm_generation.llm.llm_engine.vllm_config
    assert vllm.cache_config.num_gpu_blocks_override == ENGINE["num_gpu_blocks_override"]
    assert vllm.model_config.enforce_eager

    # The engine was last synced before the last optimizer step: evaluation must sync again.
    run.trainer.evaluate()
    assert steps_of(run.callback) == [0, 1, 2, 3]
    assert any("eval_sync/version" in entry or "sync/version" in entry for entry in run.log[-2:])
    assert_engine_has_the_trainers_weights(run)


def test_adapters_are_merged_into_what_is_sent_alone(policy, tmp_path, monkeypatch):
    """TRL's own sync, which would merge them in the trainer's weights, is replaced."""
    from peft import LoraConfig, PeftModel

    monkeypatch.setattr(PeftModel, "merge_adapter", None, raising=False)
    callback = WeightSyncCallback(engine=ENGINE, lora="merge", verify="full")
    trainer = build_trainer(
        policy,
        tmp_path,
        [callback],
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
        max_steps=4,
        learning_rate=1e-2,
    )
    model = trainer.model
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer.train()
    first, *later = callback.reports
    assert first.unsent_tensors == 0
    assert all(report.unsent_bytes > report.sent_bytes / 2 for report in later)
    assert all(report.changed_tensors for report in later)
    assert all(report.undelivered == () for report in later)
    assert all(report.prediction_exact for report in callback.reports)
    names = {f"model.layers.{i}.{n}_proj.weight" for i in (0, 1) for n in PARTS_OF_ADAPTED}
    assert set(callback.session.plan.order) == names
    assert gap(trainer.state.log_history) <= 1e-5
    assert callback.reports[-1].probe_gap <= 1e-5
    for name, parameter in model.named_parameters():
        assert name not in frozen or parameter.equal(frozen[name]), name
    callback.close()


def test_weights_of_a_lost_engine_are_not_taken_for_current(train, monkeypatch):
    """TRL itself would sync when a step has changed the weights, and not before."""
    run = train(max_steps=1)
    session, generation = run.callback.session, run.trainer.vllm_generation
    prompts = {"prompts": [[5, 6]], "images": None, "num_generations": 1}
    generation.generate(**prompts)  # sends what the training's last step has changed
    syncs = len(run.callback.reports)
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


def test_resumes_with_versions_moving_forwards(train, tmp_path, own_engines):
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
    model = run.trainer.model
    others = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    model.load_state_dict(others)
    llm.generate([{"prompt_token_ids": [5, 6]}], use_tqdm=False)
    assert gap_now(run.trainer) <= 1e-5, "torch counts that"
    assert len(run.callback.reports) == syncs + 3


def test_completions_that_may_be_a_step_behind_cost_no_eager_sync_more(
    policy, tmp_path, monkeypatch
):
    """GOLD generates at each step, here with weights of every second one."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    callback = WeightSyncCallback(engine=ENGINE, when="eager")
    trainer = build_gold_trainer(
        policy, tmp_path, [callback], teacher=policy, max_steps=8, vllm_sync_frequency=2
    )
    trainer.train()
    assert [report.step for report in callback.reports] == [0, 2, 4, 6]
    assert [report.step for report in callback.reports if "waited" in report.seconds] == [4, 6]


def test_gold_generates_with_current_weights_in_a_second_training(policy, tmp_path, monkeypatch):
    """It remembers the step of its last sync, which is ahead of all steps of the next training."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    callback = WeightSyncCallback(engine=ENGINE)
    teacher = save_policy(tmp_path / "teacher", seed=1)
    trainer = build_gold_trainer(policy, tmp_path, [callback], teacher=teacher, max_steps=3)
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


def test_a_trainer_that_exists_already_and_every_report_is_recorded(policy, tmp_path):
    """TRL's own convention, for callbacks that need the trainer."""
    recorded = []
    with engine_arguments(**ENGINE):
        trainer = build_trainer(policy, tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match="engine already"):
        WeightSyncCallback(trainer=trainer, engine=ENGINE)
    config = SyncConfig.of(policy="reorder")
    callback = WeightSyncCallback(config, trainer=trainer, recorder=recorded.append)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.bind(trainer) is callback, "as it is already"
    assert recorded == callback.reports
    assert len(recorded) == 1
    assert gap(trainer.state.log_history) <= 1e-5
    with pytest.raises(ConfigError, match="one for each trainer"):
        callback.bind(colocated())
    other = build_trainer(policy, tmp_path, use_vllm=False, max_steps=1)
    other.add_callback(callback)
    with pytest.raises(ConfigError, match="one for each trainer"):
        other.train()

    trainer.remove_callback(callback)
    trainer.add_callback(WeightSyncCallback())
    with pytest.raises(ConfigError, match=r"GRPOTrainer .*WeightSyncCallback\(trainer=trainer"):
        trainer.train()


class OnInitEnd(TrainerCallback):
    def __init__(self, do):
        self.do = do

    def on_init_end(self, *args, **kwargs):
        self.do()


def test_trainers_that_are_built_within_each_other_get_their_own_engines(
    policy, tmp_path, own_engines
):
    """The inner one between the outer one's `on_init_end` and its engine, from the same model."""
    inner, outer = (WeightSyncCallback(engine=ENGINE) for _ in range(2))
    built = []
    build_inner = OnInitEnd(
        lambda: built.append(
            build_trainer(policy, tmp_path / "inner", [inner], max_steps=2, learning_rate=1e-2)
        )
    )
    before = patched()
    built.append(build_trainer(policy, tmp_path / "outer", [outer, build_inner], max_steps=1))
    assert patched() == before
    for trainer, callback, steps in zip(built, (inner, outer), ([0, 1], [0]), strict=True):
        trainer.train()
        assert steps_of(callback) == steps
        assert gap(trainer.state.log_history) <= 1e-5
    for trainer, callback in zip(built, (inner, outer), strict=True):
        callback._sync()
        assert gap_now(trainer) <= 1e-5


def test_a_trainer_without_vllm_is_refused_when_it_trains(policy, tmp_path):
    before = patched()
    trainer = build_trainer(policy, tmp_path, [WeightSyncCallback()], use_vllm=False, max_steps=1)
    assert patched() == before
    with pytest.raises(ConfigError, match=r"GRPOTrainer .*use_vllm=True"):
        trainer.train()


def build_failing(path, directory, callback):
    """Fail after the callback has begun to wait, before the engine is built."""

    def fail():
        assert patched()[0].__wrapped__
        raise RuntimeError("building failed")

    with pytest.raises(RuntimeError, match="building failed"):
        build_trainer(path, directory, [callback, OnInitEnd(fail)])


def test_a_trainer_that_was_not_built_leaves_nothing_behind(policy, tmp_path):
    before, callback = patched(), WeightSyncCallback()
    build_failing(policy, tmp_path, callback)
    gc.collect()
    assert patched() == before
    build_failing(policy, tmp_path, callback)
    callback.close()
    assert patched() == before


def test_a_callback_that_waits_in_vain_stops_when_training_begins(policy, tmp_path):
    """As with trainers that have code of their own for vLLM."""
    before, callback = patched(), WeightSyncCallback()
    trainer = build_trainer(policy, tmp_path, [callback], use_vllm=False, max_steps=1)
    trainer.args.use_vllm = trainer.use_vllm = True
    trainer.control = trainer.callback_handler.on_init_end(*as_trainer_calls(trainer))
    assert patched() == before, "nobody who calls is a trainer"
    with pytest.raises(ConfigError, match="this trainer was built without"):
        callback.on_train_begin(*as_trainer_calls(trainer))
    type(trainer).announce = lambda self: self.callback_handler.on_init_end(*as_trainer_calls(self))
    try:
        trainer.announce()
    finally:
        del type(trainer).announce
    assert patched() != before
    with pytest.raises(ConfigError, match="code of its own for vLLM"):
        trainer.train()
    assert patched() == before


def as_trainer_calls(trainer):
    return trainer.args, trainer.state, trainer.control


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"engine": {"enforce_eagre": True}}, {}, "did you mean 'enforce_eager'"),
        ({"engine": ENGINE}, {"vllm_mode": "server"}, "qerl-sync serve"),
        ({"in_own_process": True}, {"vllm_mode": "server"}, "qerl-sync serve"),
        ({}, {"vllm_tensor_parallel_size": 2}, "this run has 1; start it with torchrun"),
        ({"in_own_process": True}, {"vllm_tensor_parallel_size": 2}, "set it to 1"),
        ({"transport": "shm"}, {"vllm_tensor_parallel_size": 2}, "choose auto"),
        ({"engine": {"tensor_parallel_size": 2}}, {}, "`engine` has 2; leave it out there"),
    ],
    ids=[
        "typo",
        "engine of a server",
        "process of a server",
        "tensor parallel in one process",
        "tensor parallel in its own process",
        "tensor parallel over shared memory",
        "tensor parallel in its engine alone",
    ],
)
def test_what_it_cannot_serve_is_refused_before_an_engine_is_built(
    policy, tmp_path, options, changes, words
):
    with pytest.raises(ConfigError, match=words):
        build_trainer(policy, tmp_path, [WeightSyncCallback(**options)], **changes)


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
        # torch.distributed was not initialized, by which processes would sync together.
        ({"num_processes": 2}, "init_process_group"),
        ({"tensor_parallel_size": 2}, "this run has 1; start it with torchrun"),
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
        ({"use_vllm": True}, "use_vllm=False", "use_vllm=True"),
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
    with pytest.raises(ConfigError, match=r"engine=\{'dtype'"):
        WeightSyncCallback(dtype="float32", policy="reorder")
    with pytest.raises(ConfigError, match="not both"):
        WeightSyncCallback(SyncConfig(), policy="reorder")


def test_what_a_killed_tensor_parallel_engine_has_left_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_segments, "SHARED_MEMORY", tmp_path)
    left = tmp_path / "-tp:0-[0-1]-cpushm_0"
    left.touch()
    with pytest.raises(ConfigError) as raised, WeightSyncCallback().connecting():
        raise RuntimeError("create shm in SHMManager failed. errno: 17")
    assert raised.value.files == (str(left),)
    with pytest.raises(RuntimeError, match="another"), WeightSyncCallback().connecting():
        raise RuntimeError("another")


def test_the_patch_is_taken_back_when_building_fails():
    from trl.generation import vllm_generation

    before = vllm_generation.LLM
    with pytest.raises(RuntimeError, match="building"), engine_arguments(dtype="float32"):
        raise RuntimeError("building failed")
    assert vllm_generation.LLM is before
