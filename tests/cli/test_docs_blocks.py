"""Every code block of the pages, by its language: what it names is there.

The cells of examples/notebooks are blocks, too.

bash: the command line takes each `qerl-sync` command, files and extras exist. yaml: the options are
taken. python: that of an example that is run (test_examples.py), or else its
names and arguments exist. console: its output is compared (test_docs_plan.py, test_scale.py).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from qerl_sync.cli.main import app
from qerl_sync.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Pages whose `console` blocks are run.
RUN = {"plan.md", "scale.md"}
# Programs of others, of which only the files that they are given are looked at.
FOREIGN = {"docker", "export", "pip", "python", "python3.11", "ray"}
GIVEN = re.compile(r"[A-Z_]+(\.yaml)?")  # MODEL, CONFIG.yaml: what the reader puts there

SHELL = "!{sys.executable} -m qerl_sync.cli "  # a notebook's way to a command of ours


class Block(NamedTuple):
    page: Path
    language: str
    text: str


BLOCKS = [
    Block(page, found["language"], re.sub(f"^{found['indent']}", "", found["text"], flags=re.M))
    for page in PAGES
    for found in re.finditer(
        r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", page.read_text(), re.M | re.S
    )
]

for notebook in sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")):
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines(keepends=True)
            ours = [line.removeprefix(SHELL) for line in lines if line.startswith(SHELL)]
            python = "".join(line for line in lines if not line.startswith("!"))
            if ours:
                BLOCKS.append(
                    Block(notebook, "bash", "".join(f"qerl-sync {line}" for line in ours))
                )
            if "import" in python and notebook.stem != "cpu":  # that one is run
                BLOCKS.append(Block(notebook, "python", python))


def commands(*, in_text: bool) -> list[list[str]]:
    """Return the commands of all blocks, or the code in running text that begins as ours do."""
    found: list[str] = []
    if in_text:
        for page in PAGES:
            text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
            found += re.findall(r"`((?:(?:\./)?scripts/|qerl-sync )[^`]+)`", text)
    else:
        for block in BLOCKS:
            if block.language == "bash":
                found += block.text.replace("\\\n", " ").splitlines()
    return [words for command in found if (words := shlex.split(command, comments=True))]


def test_each_block_says_what_it_is():
    assert {block.language for block in BLOCKS} <= {"bash", "console", "python", "text", "yaml"}
    assert {block.page.name for block in BLOCKS if block.language == "console"} == RUN
    for page in PAGES:
        text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
        options_of_a_directive = r"^::: .*\n(    .*\n)+"
        assert not re.search(r"^    ", re.sub(options_of_a_directive, "", text, flags=re.M), re.M)


@pytest.mark.parametrize("words", commands(in_text=False), ids=" ".join)
def test_a_command_is_taken(words: list[str]):
    program, *arguments = words
    if program == "torchrun":
        program, arguments = "qerl-sync", arguments[arguments.index("qerl_sync.cli") + 1 :]
    if program == "ray" and "--" in arguments:
        return test_a_command_is_taken(arguments[arguments.index("--") + 1 :])
    if program.endswith("scripts/train"):
        program, arguments = "qerl-sync", ["train", *arguments]
    if program.rpartition("/")[2] == "qerl-sync":
        command, rest = resolve(arguments)
        context = command.make_context(command.name, rest)
        config = context.params.get("config")
        if config is not None and not GIVEN.fullmatch(str(config)):
            load_config(ROOT / config, context.params["overrides"] or [])
        return None
    if "scripts/" in program:
        assert is_executable(program)
    else:
        assert program.rpartition("/")[2] in FOREIGN
    for word in arguments:
        for extra in re.findall(r"\[(\w+)\]", word):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text()
        if re.fullmatch(r"(requirements|docs|docker|configs|examples)/[\w./-]+", word):
            assert (ROOT / word).exists()


@pytest.mark.parametrize("words", commands(in_text=True), ids=" ".join)
def test_a_command_in_running_text_is_there(words: list[str]):
    program, *arguments = words
    if "scripts/" in program:
        assert is_executable(program)
        return
    command, rest = resolve(arguments)
    ours = rest[: rest.index("--")] if "--" in rest else rest
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word.partition("=")[0] for word in ours if word.startswith("-")} <= known
    for word in ours:
        if word.startswith("configs/"):
            assert (ROOT / word).exists()


def resolve(arguments: list[str]) -> tuple[Any, list[str]]:
    """Return the command of a command line, and its own arguments."""
    command, rest = typer.main.get_command(app), list(arguments)
    while hasattr(command, "commands") and rest:
        command = command.commands[rest.pop(0)]
    return command, rest


def is_executable(program: str) -> bool:
    return bool((ROOT / program).stat().st_mode & 0o100)


YAML = [block for block in BLOCKS if block.language == "yaml"]


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.page.stem)
def test_yaml_is_taken(block: Block):
    """In place of the same options of a configuration that runs."""
    changes = [
        f"{section}.{name}={json.dumps(value)}"
        for section, options in yaml.safe_load(block.text).items()
        for name, value in options.items()
    ]
    load_config(ROOT / "configs" / "grpo_cpu.yaml", changes)


PYTHON = [block for block in BLOCKS if block.language == "python"]
OF_EXAMPLES = "".join(path.read_text() for path in (ROOT / "examples").rglob("*.py"))


@pytest.mark.vllm
@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.page.stem)
def test_names_and_arguments_of_python_exist(block: Block, monkeypatch):
    """Import what it imports. A call of such a name may give the arguments that it gives."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tree, names = ast.parse(block.text), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            names |= {alias.name: getattr(module, alias.name) for alias in node.names}
    assert names or block.text.splitlines()[0] in OF_EXAMPLES
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id in names:
            accepted = inspect.signature(names[call.func.id]).parameters.values()
            given = {keyword.arg for keyword in call.keywords if keyword.arg}
            assert given <= {p.name for p in accepted} or any(
                p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted
            )
