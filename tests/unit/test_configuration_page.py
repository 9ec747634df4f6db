"""docs/configuration.md and configs/ say what the code does."""

from __future__ import annotations

from pathlib import Path

import pytest

from qerl_sync.config.document import configuration_page
from qerl_sync.config.load import load_config
from qerl_sync.config.models import SyncConfig

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == configuration_page(), (
        "python -m qerl_sync.config.document > docs/configuration.md"
    )


def test_every_option_of_the_sync_section_is_described():
    for name, field in SyncConfig.model_fields.items():
        assert field.description, name
        assert f"| `{name}` |" in configuration_page()


# Those of accelerate are its own.
CONFIGS = [p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "accelerate"]


@pytest.mark.parametrize("path", sorted(CONFIGS), ids=lambda path: path.name)
def test_every_config_is_valid(path):
    assert load_config(path, check_foreign=False).sync.policy in ("reorder", "warn", "error")


@pytest.mark.parametrize("name", ["grpo_cpu.yaml", "grpo_cpu_server.yaml"])
def test_the_main_configs_show_every_option_of_the_sync_section(name):
    text = (ROOT / "configs" / name).read_text()
    assert [name for name in SyncConfig.model_fields if f"\n  {name}:" not in text] == []
