"""`qerl-sync train --trl-config`: a file in the format of `trl grpo --config`."""

from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from qerl_sync import ConfigError
from qerl_sync.cli.main import app
from qerl_sync.config import load_config

WHOLE = """
env:
  QERL_SYNC_TEST_OF_ENV: 7
model_name_or_path: some/model
model_revision: main
dtype: bfloat16
attn_implementation: sdpa
dataset_name: rows.jsonl
dataset_train_split: train
reward_funcs: [accuracy_reward, my.rewards.short]
learning_rate: "1e-6"
use_peft: yes
lora_r: 8
lora_target_modules: [all-linear]
use_vllm: true
vllm_gpu_memory_utilization: 0.3
vllm_server_host: 0.0.0.0
bf16: no
output_dir: runs/x
max_steps: 3
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setenv("QERL_SYNC_TEST_OF_ENV", "0")

    def run(text, *overrides):
        path = tmp_path / "theirs.yaml"
        path.write_text(text)
        return load_config(path, overrides, trl_format=True)

    return run


def test_each_key_goes_to_its_section(load):
    config = load(WHOLE, "sync.policy=warn")
    assert (config.model.path, config.model.dtype) == ("some/model", "bfloat16")
    assert (config.data.path, config.output_dir, config.seed) == ("rows.jsonl", "runs/x", 42)
    assert config.reward == ("trl.rewards:accuracy_reward", "my.rewards:short")
    assert config.trainer == {
        "model_init_kwargs": {"attn_implementation": "sdpa"},
        "learning_rate": 1e-6,
        "vllm_gpu_memory_utilization": 0.3,
        "bf16": False,
        "max_steps": 3,
    }
    assert config.peft is not None
    assert (config.peft["r"], config.peft["lora_dropout"]) == (8, 0.05)
    assert config.peft["target_modules"] == "all-linear"
    assert (config.rollout.mode, config.sync.policy) == ("colocate", "warn")
    assert os.environ["QERL_SYNC_TEST_OF_ENV"] == "7"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("null", {}),
        ("{revision: a}", {"revision": "a"}),
        ("""'{"revision": "a"}'""", {"revision": "a"}),
    ],
)
def test_arguments_of_the_model_in_every_form_that_trl_takes(load, written, expected):
    more = f"model_init_kwargs: {written}\n"
    for text in (WHOLE + more, more + WHOLE):
        assert load(text).trainer["model_init_kwargs"] == {
            "attn_implementation": "sdpa",
            **expected,
        }


def test_one_reward_function_needs_no_list(load):
    text = WHOLE.replace("[accuracy_reward, my.rewards.short]", "accuracy_reward")
    assert load(text).reward == ("trl.rewards:accuracy_reward",)


def test_a_server_is_found_where_trl_would_find_it(load):
    more = "vllm_mode: server\nvllm_server_port: 8001\nvllm_server_timeout: 9\n"
    rollout = load(WHOLE + more).rollout
    assert (rollout.mode, rollout.server_url) == ("server", "http://127.0.0.1:8001")
    assert rollout.start_timeout_seconds == 9
    named = load(WHOLE + more + "vllm_server_base_url: http://gpu-1:80\n").rollout
    assert named.server_url == "http://gpu-1:80"


def test_without_use_peft_all_weights_train(load):
    assert load(WHOLE.replace("use_peft: yes", "use_peft: false")).peft is None


def test_all_that_cannot_be_followed_is_named_with_its_line(load):
    wrong = {
        "learning_rat": "1",
        "load_in_4bit": "true",
        "reward_model_name_or_path": "some/model",
        "resume_from_checkpoint": "x",
    }
    with pytest.raises(ConfigError) as raised:
        load(WHOLE + "".join(f"{key}: {value}\n" for key, value in wrong.items()))
    assert {place for place, _ in raised.value.violations} == set(wrong)
    assert "learning_rat (line 21)" in str(raised.value)
    two = "datasets: [{path: a}, {path: b}]\n"
    for text, place in ((two, "datasets"), ("use_vllm: false\n", "use_vllm")):
        with pytest.raises(ConfigError) as raised:
            load(WHOLE.replace("use_vllm: true\n", "").replace("dataset_name", "#") + text)
        assert place in {place for place, _ in raised.value.violations}


def test_one_data_set_may_stand_in_a_list(load):
    text = WHOLE.replace("dataset_name: rows.jsonl\ndataset_train_split: train\n", "")
    data = load(text + "datasets: [{path: a/b, name: c, split: test}]\n").data
    assert (data.path, data.subset, data.split) == ("a/b", "c", "test")


def test_the_command_takes_one_file(tmp_path):
    for given in ([], ["a.yaml", "--trl-config", "b.yaml"], ["sync.policy=warn"]):
        assert CliRunner().invoke(app, ["train", *given]).exit_code == 2
    missing = str(tmp_path / "missing.yaml")
    run = CliRunner().invoke(app, ["train", "--trl-config", missing, "sync.policy=warn"])
    assert run.exit_code == 2
    assert "missing.yaml" in run.output
