"""Makes, checks and repairs the checkout's virtual environment, .venv. Run by scripts/setup.

    stamp right, packages there ──────────────────────────────────────────> nothing to do
    .venv not usable ──> [1] make it ──┐
    packages missing or damaged ───────┴> [2] install them ─> [3] the project ─> [4] import ─> stamp

The stamp is removed before the first change and written, atomically, after the last: whatever was
interrupted is found and finished by the next call. One call works at a time, the others wait.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PathDistribution
from pathlib import Path

from console import HEARTBEAT_SECONDS, SetupError, Steps, Watch, say

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.txt"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
SITE = VENV / "lib" / "python3.11" / "site-packages"
STAMP = VENV / "setup.stamp"
LOG = VENV / "setup.log"

NEEDED_DISK_BYTES = 4 * 2**30

# Imported once at the end: it proves that the environment works, and compiles what every run
# imports (pip is told not to compile: most of the 24,000 files are never imported).
FIRST_IMPORTS = """
import vllm.entrypoints.llm, vllm.v1.engine.llm_engine, vllm.v1.worker.cpu_worker
from trl import GRPOTrainer, SFTTrainer
import datasets, matplotlib.pyplot, peft, pytest, typer
"""

# What each script imports, looked for in an environment of the user's own.
CORE = ["pydantic", "yaml", "typer", "rich"]
ENGINES = ["torch", "transformers", "vllm", "trl", "matplotlib"]
MODULES = {
    "run": [*CORE, *ENGINES],
    "test": [
        *CORE,
        *ENGINES,
        "peft",
        "pytest",
        "pytest_timeout",
        "xdist",
        "pytest_benchmark",
        "hypothesis",
    ],
    "check": [*CORE, "torch", "ruff", "mypy", "importlinter"],
}


def main(arguments: list[str]) -> None:
    purpose = next((word for word in arguments if word in MODULES), "run")
    if "own" in arguments:
        return check_own_environment(purpose)
    if "--verify" in arguments:
        STAMP.unlink(missing_ok=True)
    if not is_ready():
        require_platform()
        with one_at_a_time() as lock_file:
            if not is_ready():  # another call may have done it meanwhile
                make_ready(Steps(LOG, lock_file))
    if not arguments:
        say(f"{VENV} is ready")


# ---------------------------------------------------------------------------- what is there


def is_ready() -> bool:
    """Takes milliseconds: the stamp fits, and what it vouches for has not been removed since."""
    return stamped() == fingerprints() and PYTHON.exists() and packages_in_place()


def fingerprints() -> list[str]:
    """Of the packages, and of the project: its metadata and where it lies."""
    contents = (LOCK.read_bytes(), (ROOT / "pyproject.toml").read_bytes() + os.fsencode(ROOT))
    return [hashlib.sha256(content).hexdigest() for content in contents]


def stamped() -> list[str]:
    return STAMP.read_text().split() if STAMP.exists() else []


def packages_in_place() -> bool:
    """By name only: each locked version is registered, and the main modules are there."""
    modules = ("pip", "torch", "transformers", "trl", "vllm")
    registered = {name: version for name, (version, _) in registered_packages().items()}
    return locked_packages().items() <= registered.items() and all(
        (SITE / name / "__init__.py").exists() for name in modules
    )


def locked_packages() -> dict[str, str]:
    """Normalised name -> version."""
    lines = (line for line in LOCK.read_text().splitlines() if line and line[0] != "#")
    return {normalised(name): version for name, _, version in (ln.partition("==") for ln in lines)}


def registered_packages() -> dict[str, tuple[str, Path]]:
    """Normalised name -> version and .dist-info folder, of what pip takes for installed."""
    folders = [folder for folder in SITE.glob("*.dist-info") if folder.name[0] != "~"]
    parts = [folder.name.removesuffix(".dist-info").partition("-") for folder in folders]
    return {
        normalised(name): (version, folder)
        for (name, _, version), folder in zip(parts, folders, strict=True)
    }


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def is_usable() -> bool:
    """Whether .venv has a Python 3.11 that runs, was made in this very folder, and has pip."""
    code = "import sys, pip._internal.cli.main; sys.exit(sys.version_info[:2] != (3, 11))"
    try:
        made_here = os.fsencode(VENV / "bin" / "python") in (VENV / "bin" / "pip").read_bytes()
        run = subprocess.run([PYTHON, "-I", "-c", code], stderr=subprocess.DEVNULL)
        return made_here and run.returncode == 0
    except OSError:
        return False


def missing_packages() -> list[str]:
    """The pins whose package is absent, of another version, or damaged.

    A damaged package is unregistered here, or pip would take it for installed. What an interrupted
    uninstallation left aside (folders that begin with "~") goes too.
    """
    for leftover in SITE.glob("~*"):
        shutil.rmtree(leftover, ignore_errors=True)
    locked, registered = locked_packages(), registered_packages()
    files = {name: files_of(folder) for name, (_, folder) in registered.items()}
    sizes = defaultdict(set)  # a few files belong to two packages: the size of either is right
    for path, size in (item for listed in files.values() for item in listed):
        sizes[path].add(size)
    for name in locked.keys() & registered.keys():
        if not is_whole(files[name], sizes):
            shutil.rmtree(registered.pop(name)[1])
    return [
        f"{name}=={version}"
        for name, version in locked.items()
        if name not in registered or registered[name][0] != version
    ]


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Path and size of a package's files; none if pip did not get to its end.

    Bytecode is left out: Python rewrites it, with another size, whenever it sees fit.
    """
    distribution = PathDistribution(folder)
    # pip writes INSTALLER when all files lie there.
    listed = distribution.files if distribution.read_text("INSTALLER") else None
    kept = (file for file in listed or () if file.size is not None and file.suffix != ".pyc")
    return [(f"{SITE}/{file}", file.size) for file in kept]


def is_whole(files: list[tuple[str, int]], sizes: dict[str, set[int]]) -> bool:
    try:
        return bool(files) and all(os.stat(path).st_size in sizes[path] for path, _ in files)
    except OSError:
        return False


# -------------------------------------------------------------------------------- making it


def make_ready(steps: Steps) -> None:
    wanted, usable = fingerprints(), is_usable()
    packages_known_good = usable and stamped()[:1] == wanted[:1] and packages_in_place()
    STAMP.unlink(missing_ok=True)

    steps.begin(f"virtual environment, Python {platform.python_version()}, in {VENV}")
    if not usable:
        make_venv(steps)
    missing = [] if packages_known_good else missing_packages()
    steps.begin(f"packages: {len(missing)} of {len(locked_packages())} to install")
    if missing:
        install_packages(steps, missing)
    steps.begin("qerl-sync itself, editable")
    pip(steps, "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    if not packages_known_good:
        steps.begin("first imports (compiles what every run imports)")
        try:
            steps.run([PYTHON, "-I", "-c", FIRST_IMPORTS])
        except SetupError as error:
            if not usable:
                raise
            # Something beside the locked packages stands in the way: only a new start removes it.
            say(f"{error}\n.venv does not work; making it anew")
            shutil.rmtree(VENV)
            return make_ready(Steps(LOG, steps.lock_file))
    write_stamp(wanted)
    steps.end()


def make_venv(steps: Steps) -> None:
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            f"{sys.executable} cannot make virtual environments: its module ensurepip is missing. "
            "On Debian and Ubuntu it is in the package python3.11-venv"
        )
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir(exist_ok=True)
    # The base interpreter's own path: this very process may run from the .venv just removed.
    base = getattr(sys, "_base_executable", sys.executable)
    steps.run([base, "-I", "-m", "venv", VENV])
    pip(steps, "--no-compile", f"pip=={locked_packages()['pip']}")


def install_packages(steps: Steps, pins: list[str]) -> None:
    free = shutil.disk_usage(VENV).free
    if len(pins) > 100 and free < NEEDED_DISK_BYTES:
        raise SetupError(
            f"{VENV} needs about {NEEDED_DISK_BYTES / 1e9:.0f} GB and its disk has "
            f"{free / 1e9:.1f} GB free: make room there"
        )
    # The one that pip may not find comes first, before gigabytes are fetched in vain.
    pins = sorted(pins, key=lambda pin: "+" not in pin)
    try:
        pip(steps, "--no-deps", "--no-compile", *pins, watch=PipProgress(len(pins)))
    except SetupError as error:
        lost = re.search(r"No matching distribution found for (torch==\S+)", str(error))
        raise SetupError(f"{error}\n\n{how_to_find(lost[1])}" if lost else str(error)) from None


def how_to_find(torch: str) -> str:
    return f"""pip finds no {torch}. CPU builds of torch are not on PyPI but in PyTorch's own
index of CPU wheels: PyTorch's "Get started" page shows its address (Linux, Pip, Python, CPU: it
stands after --index-url). Give it to pip and run the same command again:
    export PIP_EXTRA_INDEX_URL=ADDRESS
or, for this project alone, an index or a folder of wheels:
    export QERL_SYNC_PIP_ARGS='--extra-index-url ADDRESS'
    export QERL_SYNC_PIP_ARGS='--find-links FOLDER'"""


def pip(steps: Steps, *arguments: str, watch: Watch | None = None) -> None:
    extra = shlex.split(os.environ.get("QERL_SYNC_PIP_ARGS", ""))
    quiet = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    steps.run([PYTHON, "-I", "-u", "-m", "pip", "install", *quiet, *arguments, *extra], watch)


class PipProgress:
    """Turns a line of pip's output, or none, into a short word on how far it is."""

    def __init__(self, num_packages: int):
        self.num_packages = num_packages
        self.num_fetched = 0
        self.num_before: int | None = None

    def __call__(self, line: str) -> str:
        if line.startswith(("Collecting ", "Processing ")):
            self.num_fetched += 1
        elif line.startswith("Installing collected packages"):
            self.num_before = len(registered_packages())
        if self.num_before is None:
            return f"fetched {self.num_fetched} of {self.num_packages}"
        return f"unpacked {len(registered_packages()) - self.num_before} of {self.num_packages}"


def write_stamp(fingerprints: list[str]) -> None:
    unfinished = STAMP.with_suffix(".new")
    unfinished.write_text("\n".join(fingerprints) + "\n")
    unfinished.replace(STAMP)


@contextmanager
def one_at_a_time() -> Iterator[int]:
    with (ROOT / ".venv.lock").open("w") as file:
        waited = 0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waited % HEARTBEAT_SECONDS == 0:
                    say(f"another set-up of {ROOT} is running; waiting for it ({waited} s)")
                time.sleep(1)
                waited += 1
        yield file.fileno()


# ------------------------------------------------------------------------- other environments


def require_platform() -> None:
    found = (platform.system(), platform.machine())
    if found != ("Linux", "x86_64"):
        raise SetupError(
            f"requirements/cpu.txt holds for Linux on x86_64, this is {' on '.join(found)}. Make "
            "an environment of your own (docs/install.md) and set QERL_SYNC_PYTHON to its python"
        )


def check_own_environment(purpose: str) -> None:
    """Nothing is installed into it: raises if something is missing, naming all of it."""
    missing = [name for name in MODULES[purpose] if importlib.util.find_spec(name) is None]
    project = importlib.util.find_spec("qerl_sync")
    if project is None or project.origin is None:
        missing.append("qerl_sync")
    elif ROOT not in Path(project.origin).resolve().parents:
        missing.append(f"this checkout's qerl_sync (it has {project.origin})")
    if missing:
        extras = {"run": "gpu", "test": "gpu,peft,test", "check": "dev"}[purpose]
        raise SetupError(
            f"QERL_SYNC_PYTHON={sys.executable} lacks: {', '.join(missing)}.\n"
            "Nothing is installed into an environment of your own. On a GPU machine this does it:\n"
            f"    {sys.executable} -m pip install -e '{ROOT}[{extras}]'\n"
            "For a CPU machine see docs/install.md, or unset QERL_SYNC_PYTHON: scripts/setup then "
            "makes .venv"
        )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SetupError as error:
        sys.exit(f"\nscripts/setup: {error}")
    except KeyboardInterrupt:
        sys.exit("\nscripts/setup: interrupted; the next call goes on from here")
