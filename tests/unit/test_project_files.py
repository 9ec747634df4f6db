"""Files that nothing else reads: they name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from qerl_sync import __version__

ROOT = Path(__file__).parents[2]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (__version__, "Apache-2.0")


def test_the_workflow_runs_scripts_that_are_there():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert all((ROOT / step.split()[0]).stat().st_mode & 0o100 for step in steps)


def test_issue_templates_ask_for_commands_that_there_are():
    from qerl_sync.cli.main import app

    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        template = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= template.keys()
        assert set(re.findall(r"`qerl-sync (\w+)", path.read_text())) <= commands


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_images_copy_what_is_there(name):
    text = (ROOT / f"docker/{name}.Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / source).exists() for source in sources)
