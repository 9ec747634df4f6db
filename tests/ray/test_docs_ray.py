"""What docs/ray.md and docs/kuberay-job.yaml say of files, options and names is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

import qerl_sync
from qerl_sync import load_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ray.md").read_text()


@pytest.mark.vllm
def test_the_job_runs_a_configuration_that_is_there():
    job = yaml.safe_load((ROOT / "docs" / "kuberay-job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, command, config, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("qerl-sync", "train")
    loaded = load_config(ROOT / config.removeprefix("/app/"), overrides)
    assert loaded.ray.address == "auto"
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        assert {v["name"] for v in pod["volumes"]} == set(mounts.values())
        assert loaded.output_dir.startswith("/runs")
        assert {"/runs", "/dev/shm"} == set(mounts)


@pytest.mark.vllm
def test_the_commands_of_the_page_name_files_and_options_that_there_are():
    commands = re.findall(r"qerl-sync train (\S+)((?: \S+=\S+)*)$", PAGE, re.M)
    jobs = [overrides for _, overrides in commands if "ray.address=auto output_dir=/" in overrides]
    assert jobs  # a job's own directory does not outlive it
    assert len(commands) == 3
    for config, overrides in commands:
        assert load_config(ROOT / config, overrides.split()).rollout.mode == "ray"


def test_the_table_of_the_page_names_what_there_is():
    for line in re.findall(r"^\| (`\w+\.\w+\(.*?\)`|`\w+\.versions`)", PAGE, re.M):
        owner, method = re.findall(r"`(\w+)\.(\w+)", line)[0]
        assert hasattr(getattr(qerl_sync, owner), method)
