"""Print what this Python lacks for a script: own_environment.py run|test|check. Install nothing."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ["pydantic", "yaml", "typer", "rich", "torch", "transformers", "vllm", "trl", "matplotlib"]
TEST = ["peft", "pytest", "pytest_timeout", "pytest_benchmark", "hypothesis"]
# Modules, and the extras of pyproject.toml that bring them.
NEEDED = {
    "run": (RUN, "gpu"),
    "test": (RUN + TEST, "gpu,peft,test"),
    "check": ([*RUN[:5], "ruff", "mypy", "importlinter"], "dev"),
}

modules, extras = NEEDED.get(sys.argv[1], NEEDED["run"])
missing = [name for name in modules if importlib.util.find_spec(name) is None]
project = importlib.util.find_spec("qerl_sync")
if project is None or project.origin is None:
    missing.append("qerl_sync")
elif ROOT not in Path(project.origin).resolve().parents:
    missing.append(f"this checkout's qerl_sync (it has {project.origin})")
if missing:
    sys.exit(
        f"\nscripts/setup: QERL_SYNC_PYTHON={sys.executable} lacks: {', '.join(missing)}.\n"
        "Nothing is installed into an environment of your own. On a GPU machine this does it:\n"
        f"    {sys.executable} -m pip install -e '{ROOT}[{extras}]'\n"
        "For a CPU machine see docs/install.md, or unset QERL_SYNC_PYTHON: scripts/setup then "
        "makes .venv"
    )
