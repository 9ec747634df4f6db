"""The configuration: what is read, what is refused, and that everything wrong is said at once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qerl_sync import TrainerActor, WeightSyncCallback, WorkerPool
from qerl_sync.config import SyncConfig, TrainConfig, load_config
from qerl_sync.config.models import Section
from qerl_sync.config.violations import nearest
from qerl_sync.config.yaml_tree import apply_overrides, read_tree
from qerl_sync.errors import ConfigError

SMALLEST = """
model: {path: some/model}
data: {task: addition}
reward: exact_match
output_dir: out
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def load(path: Path, *overrides: str) -> TrainConfig:
    return load_config(path, overrides, check_foreign=False)


def refusal(path: Path, *overrides: str, foreign: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, check_foreign=foreign)
    return str(caught.value)


def test_the_smallest_file_has_our_defaults(write):
    config = load(write(SMALLEST))
    assert config.sync == SyncConfig()
    assert config.sync.policy == "reorder"
    assert config.reward == ("exact_match",)
    assert config.warmup is None


def test_every_field_says_what_it_is():
    undescribed = [
        f"{section.__name__}.{name}"
        for section in Section.__subclasses__()
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert undescribed == []


def test_overrides_are_yaml_and_reach_any_depth(write):
    config = load(
        write(SMALLEST),
        "sync.policy=warn",
        "trainer.max_steps=20",
        "trainer.learning_rate=1e-3",
        "trainer.save_strategy=no",
        "rollout.engine.enforce_eager=true",
        "reward=[exact_match, a.b:c]",
        "sync.chunk_bytes=64MiB",
        "model.path=null",
        "model.tiny.config.hidden_size=8",
    )
    assert config.sync.policy == "warn"
    assert config.trainer == {"max_steps": 20, "learning_rate": 1e-3, "save_strategy": "no"}
    assert config.rollout.engine == {"enforce_eager": True}
    assert config.reward == ("exact_match", "a.b:c")
    assert config.sync.chunk_bytes == 64 * 2**20
    assert config.model.tiny is not None
    assert config.model.tiny.config == {"hidden_size": 8}


def test_one_error_lists_everything_with_its_place(write):
    text = refusal(
        write(SMALLEST + "sync:\n  polcy: warn\n  source_order: randm\ntrainr: {}\npolicy: warn\n"),
        "data.size=0",
        "sync.chunk_bytes=64 foo",
        "nonsense",
    )
    lines = text.splitlines()
    assert lines[0].endswith("7 problems")
    expected = {
        "sync.polcy (line 7)": "'policy'",
        "sync.source_order (line 8)": "random:SEED",
        "trainr (line 9)": "'trainer'",
        "policy (line 10)": "'sync.policy'",
        "data.size (command line)": "greater than 0",
        "sync.chunk_bytes (command line)": "64 foo",
        "nonsense": "section.key=value",
    }
    for place, words in expected.items():
        assert any(place in line and words in line for line in lines[1:]), (place, text)


def test_addresses_of_the_trainer(write):
    for address in ("127.0.0.1", "::1", "10.0.0.7", "a-host.example"):
        elsewhere = "rollout.mode=subprocess"
        config = load(write(SMALLEST), f"sync.trainer_address='{address}'", elsewhere)
        assert config.sync.trainer_address == address


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.task=additon", "did you mean 'addition'"),
        ("rollout.mode=servr", "did you mean 'server'"),
        ("rollout.server_url=localhost:8000", "write http://127.0.0.1:8000"),
        ("rollout.server_port=70000", "65535"),
        ("sync.trainer_address=0.0.0.0", "or 127.0.0.1 where all are on it"),
        ("sync.trainer_address='0'", "`hostname -I`"),
        ("sync.trainer_address='::'", "`hostname -I`"),
        ("sync.trainer_address=''", "`hostname -I`"),
        ("data.path=x", "exactly one of 'path' and 'task'; both"),
        ("data.task=null", "exactly one of 'path' and 'task'; neither"),
        ("reward=[]", "reward"),
        ("sync=3", "sync (command line): is a section"),
        ("seed.x=1", "seed"),
        ("output_dir=null", "output_dir"),
        ("=3", "is no override"),
        ("a..b=3", "is no override"),
        ("seed=[", "no valid YAML"),
    ],
)
def test_wrong_values(write, override, words):
    assert words in refusal(write(SMALLEST), override)


CONTRADICTIONS = {
    "a transport between processes within one": (
        ["sync.transport=shm"],
        {"sync.transport": "'shm' is for workers in other processes"},
    ),
    "by reference to another process": (
        ["rollout.mode=subprocess", "sync.transport=inproc"],
        {"sync.transport": "with `rollout.mode: subprocess` the engine is in another"},
    ),
    "a server's options without one": (
        ["rollout.mode=subprocess", "rollout.server_url=http://x", "rollout.server_port=8000"],
        {"rollout.server_url": "the mode is subprocess", "rollout.server_port": "mode: server"},
    ),
    "a server that is to be started and runs": (
        [
            "rollout.mode=server",
            "rollout.server_url=http://x",
            "rollout.server_port=8000",
            "rollout.engine.dtype=float32",
        ],
        {"rollout.server_port": "names one that runs", "rollout.engine": "has been started"},
    ),
    "TRL's arguments for its own engine": (
        ["rollout.mode=server", "trainer.vllm_max_model_length=8", "sync.transport=inproc"],
        {
            "trainer.vllm_max_model_length": "`rollout.engine.max_model_len`",
            "sync.transport": "choose auto, shm or tcp",
        },
    ),
    "an engine that TRL cannot share its process with": (
        ["rollout.engine.tensor_parallel_size=2"],
        {"rollout.engine.tensor_parallel_size": "to subprocess or server"},
    ),
    "the object store for an engine outside of its actor": (
        ["rollout.mode=ray", "rollout.async_engine=true", "sync.transport=ray"],
        {"sync.transport": "'ray' brings chunks to the actor's own process"},
    ),
    "Ray's options without it": (
        ["rollout.async_engine=true", "rollout.max_staleness=1"],
        {"rollout.async_engine": "mode is colocate", "rollout.max_staleness": "mode is colocate"},
    ),
    "the server's log probabilities": (
        ["rollout.mode=server", "rollout.engine.max_logprobs=5"],
        {"rollout.engine.max_logprobs": "is ours"},
    ),
}


# What each of these makes of the options given with it: nothing, without a word.
WITHOUT_EFFECT = {
    "a spilling plan's": ["sync.spill_budget_bytes=1GiB", "sync.spill_directory=/tmp"],
    "a tolerance of what is not measured": ["sync.verify_tolerance=0.1"],
    "an address of metrics that are not served": ["sync.metrics_address=0.0.0.0"],
    "requests that do not wait": [
        "sync.recompute_running=false",
        *("rollout.mode=server", "sync.pause_mode=abort"),
    ],
    "waits within one process": [
        *("sync.trainer_port=4000", "sync.chunks_in_flight=3", "sync.pause_mode=wait"),
        "sync.trainer_bind=0.0.0.0",
        "rollout.start_timeout_seconds=10",
    ],
    "going back, in a pool": ["sync.on_failure=rollback", "rollout.mode=ray"],
    "more of Ray's": ["rollout.max_restarts=0", "rollout.generate_timeout_seconds=9"],
    "a cluster that runs": ["ray.num_cpus=3", "rollout.mode=ray", "ray.address=auto"],
    "a data set on the hub": ["data.split=test", "data.subset=en", "data.prompt_column=question"],
    "a single file": ["data.split=test", "data.task=null", "data.path=x.jsonl"],
    "a task": ["data.size=7", "data.task=null", "data.path=x.jsonl"],
    "TRL's, overridden": [
        "trainer.vllm_gpu_memory_utilization=0.3",
        "rollout.engine.gpu_memory_utilization=0.2",
    ],
}
GIVE_OTHERS_NONE = (
    "rollout.mode",
    "sync.pause_mode=abort",
    "ray.address",
    "data.task",
    "data.path",
)


@pytest.mark.parametrize("case", WITHOUT_EFFECT)
def test_an_option_without_effect_is_an_error_that_lists_all_of_them(write, case):
    overrides = WITHOUT_EFFECT[case]
    with pytest.raises(ConfigError) as caught:
        load_config(write(SMALLEST), [*overrides, "sync.source_order=?"], check_foreign=False)
    places = [place for place, _ in caught.value.violations]
    refused = [
        text.partition("=")[0] for text in overrides if not text.startswith(GIVE_OTHERS_NONE)
    ]
    refused = [place for place in refused if place != "rollout.engine.gpu_memory_utilization"]
    assert sorted(places) == sorted([*refused, "sync.source_order"])


@pytest.mark.parametrize(
    ("options", "places"),
    [
        (
            {"verify_tolerance": 0.1, "spill_directory": "/tmp"},
            {"verify_tolerance", "spill_directory"},
        ),
        ({"delta": "layers", "mirror_budget_bytes": 1}, {"mirror_budget_bytes"}),
        ({"transport": "inproc", "chunks_in_flight": 3}, {"chunks_in_flight"}),
        ({"timeout_seconds": float("inf")}, {"timeout_seconds"}),
        ({"timeout_seconds": float("nan")}, {"timeout_seconds"}),
        ({"timeout_seconds": 1e300}, {"timeout_seconds"}),
        ({"verify": "full", "verify_tolerance": float("inf")}, {"verify_tolerance"}),
    ],
)
def test_a_section_from_keywords_is_held_to_the_same(options, places):
    with pytest.raises(ConfigError) as caught:
        SyncConfig.of(**options)
    assert {place for place, _ in caught.value.violations} == places


@pytest.mark.parametrize(
    "override",
    [
        "sync.timeout_seconds=.inf",
        "rollout.start_timeout_seconds=.inf",
        "rollout.generate_timeout_seconds=.inf",
        "ray.placement_seconds=.inf",
    ],
)
def test_every_wait_ends(write, override):
    with pytest.raises(ConfigError) as caught:
        load_config(write(SMALLEST), ["rollout.mode=ray", override], check_foreign=False)
    assert [place for place, _ in caught.value.violations] == [override.partition("=")[0]]


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_does_not_go_together_is_listed_like_all_else(write, case):
    overrides, expected = CONTRADICTIONS[case]
    lines = refusal(write(SMALLEST), *overrides, "seed=x").splitlines()
    assert lines[0].endswith(f"{len(expected) + 1} problems")
    for place, words in expected.items():
        found = [line for line in lines if line.startswith((f"  {place} (", f"  {place}:"))]
        assert any(words in line for line in found), lines


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.mode=subprocess", "sync.transport=tcp", "rollout.server_url=null"],
        ["rollout.mode=subprocess", "rollout.engine.tensor_parallel_size=2"],
        ["rollout.mode=server", "rollout.server_url=http://x", "rollout.engine={}"],
        ["rollout.mode=server", "rollout.server_port=8000", "rollout.engine.dtype=float32"],
        ["rollout.mode=ray", "rollout.async_engine=true", "sync.transport=auto"],
        ["rollout.mode=ray", "rollout.engine.tensor_parallel_size=1", "sync.transport=ray"],
        ["sync.transport=inproc", "rollout.start_timeout_seconds=600"],
        ["sync.timeout_seconds=60"],  # trainer processes that have an engine each wait so long
        ["sync.metrics_port=9100", "sync.metrics_address=0.0.0.0"],
        ["sync.verify=full", "sync.verify_tolerance=0.1"],
        ["sync.policy=spill", "sync.spill_budget_bytes=1GiB", "sync.spill_directory=/tmp"],
        ["rollout.mode=server", "sync.recompute_running=false", "sync.timeout_seconds=1e6"],
        ["data.task=null", "data.path=some/rows", "data.split=test"],
        ["rollout.mode=ray", "ray.address=auto", "ray.object_store_bytes=512MiB"],
    ],
)
def test_what_goes_together(write, overrides):
    load(write(SMALLEST), *overrides)


def test_what_is_missing_is_named(write):
    text = refusal(write("seed: 1\n"))
    for name in ("model", "data", "reward", "output_dir"):
        assert f"  {name}: is required and missing" in text


def test_a_key_that_stands_twice_is_an_error(write):
    text = refusal(write(SMALLEST + "seed: 1\nsync:\n  policy: warn\nseed: 2\n"))
    assert "seed (line 9): stands twice, first in line 6" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [", "no valid YAML"), ("- a\n- b", "holds list, not a mapping"), ("word", "holds str")],
)
def test_what_is_no_configuration_at_all(write, text, words):
    assert words in refusal(write(text))


def test_an_empty_file_lacks_everything(write):
    assert "model: is required and missing" in refusal(write(""))


def test_a_missing_file_and_a_directory(tmp_path, write):
    write(SMALLEST)
    assert "run.yaml" in refusal(tmp_path / "rum.yaml")
    assert "cannot be read" in refusal(tmp_path)


def test_configurations_cannot_be_changed(write):
    config = load(write(SMALLEST))
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3


def test_a_section_and_its_fields_are_not_both_given():
    from qerl_sync.integrations.trl_async import AsyncWeightTransfer

    takers: list[Any] = [WeightSyncCallback, partial(AsyncWeightTransfer, "http://127.0.0.1:1")]
    for take in [*takers, partial(TrainerActor().sync_to, WorkerPool({}), None)]:
        with pytest.raises(ConfigError, match="not both"):
            take(config=SyncConfig(), policy="warn")


def test_a_section_from_keywords():
    assert SyncConfig.of(policy="warn").policy == "warn"
    with pytest.raises(ConfigError, match=r"polcy: no such key; did you mean 'policy'"):
        SyncConfig.of(polcy="warn")


SCALARS = {
    "1e-3": 1e-3,
    "6e5": 6e5,
    "1.5": 1.5,
    "-2": -2,
    "0": 0,
    "0x10": 16,
    "no": "no",
    "off": "off",
    "true": True,
    "null": None,
    "1:30": "1:30",
    "64MiB": "64MiB",
    "random:0": "random:0",
    "[1, 2.]": [1, 2.0],
}


@pytest.mark.parametrize("text", SCALARS)
def test_scalars_mean_what_people_mean(text):
    tree, _, _ = read_tree(f"key: {text}", "here")
    same_on_the_command_line: dict[str, object] = {}
    assert apply_overrides(same_on_the_command_line, [f"key={text}"], {}) == []
    assert tree["key"] == same_on_the_command_line["key"] == SCALARS[text]
    assert type(tree["key"]) is type(SCALARS[text])


@given(
    st.recursive(
        st.integers() | st.text("ab .", max_size=5) | st.none() | st.booleans(),
        lambda inner: st.dictionaries(st.text("abc", min_size=1), inner),
    )
)
def test_any_tree_written_as_yaml_is_read_back(value):
    tree, lines, doubled = read_tree(yaml.safe_dump({"root": value}), "here")
    assert tree == {"root": value}
    assert lines["root"] == "line 1"
    assert doubled == []


def test_nearest():
    assert nearest("polcy", ["policy", "order"]) == "did you mean 'policy'?"
    assert nearest("zzz", ["b", "a"]) == "valid: a, b"
    assert nearest("zzz", [f"key{i}" for i in range(100)]) == "nothing valid is spelled like it"


@pytest.mark.vllm
class TestForeignSections:
    """The sections that TRL, vLLM and transformers read, held against what is installed."""

    def test_unknown_keys_wrong_types_and_ours(self, write):
        text = refusal(
            write(SMALLEST),
            "trainer.learnin_rate=1",
            "trainer.max_steps=many",
            "trainer.bf16=no",
            "trainer.use_vllm=true",
            "trainer.output_dir=x",
            "warmup.trainer.max_stepz=1",
            "rollout.engine.enforce_eagr=true",
            "rollout.engine.dtype=flaot32",
            "rollout.engine.weight_transfer_config={}",
            "trainer.vllm_server_base_url=http://127.0.0.1:1",
            "model.path=null",
            "model.tiny.architecture=qwen4",
            foreign=True,
        )
        expected = {
            "trainer.learnin_rate": "did you mean 'learning_rate'",
            "trainer.max_steps": "must be int, not 'many'",
            "trainer.bf16": "must be bool | None, not 'no'",
            "trainer.use_vllm": "is ours",
            "trainer.output_dir": "--output-dir",
            "warmup.trainer.max_stepz": "did you mean 'max_steps'",
            "rollout.engine.enforce_eagr": "did you mean 'enforce_eager'",
            "rollout.engine.dtype": "did you mean 'float32'",
            "rollout.engine.weight_transfer_config": "section `sync`",
            "trainer.vllm_server_base_url": "`rollout.server_url`",
            "model.tiny.architecture": "did you mean 'qwen3'",
        }
        lines = text.splitlines()
        assert lines[0].endswith(f"{len(expected)} problems")
        for place, words in expected.items():
            assert any(f"  {place} " in line and words in line for line in lines), (place, text)

    @pytest.mark.parametrize("place", ["trainer.peft_config", "warmup.trainer.peft_config"])
    def test_an_argument_of_the_trainer_is_told_from_a_misspelt_setting(self, write, place):
        with pytest.raises(ConfigError) as caught:
            load_config(write(SMALLEST), [f"{place}.r=8"])
        ((found, message),) = caught.value.violations
        assert found == place
        assert "fsdp_config" not in message
        assert "an argument of" in message
        assert f"{place} (command line)" in str(caught.value)

    def test_a_models_own_configuration(self, write):
        tiny = ("model.path=null", "model.tiny.architecture=qwen3_moe")
        text = refusal(write(SMALLEST), *tiny, "model.tiny.config.hidden_siz=8", foreign=True)
        assert "did you mean 'hidden_size'" in text
        # Not declared by its configuration class, and read by the model nevertheless.
        load_config(write(SMALLEST), [*tiny, "model.tiny.config.head_dim=8"])

    def test_a_missing_package_is_named(self, write, monkeypatch):
        monkeypatch.setattr("qerl_sync.config.foreign.find_spec", lambda name: None)
        text = refusal(write(SMALLEST), "trainer.max_steps=1", foreign=True)
        assert "trainer (command line): trl is not installed; `./scripts/setup`" in text
