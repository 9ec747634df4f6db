"""Build the command line and the environment of a vLLM server that TRL and qerl-sync can drive."""

from __future__ import annotations

import ipaddress
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qerl_sync.engines.environment import ON_SHARED_CORES
from qerl_sync.errors import ConfigError
from qerl_sync.plan.checkpoint import require_model_directory
from qerl_sync.serving import middleware

LOOPBACK = "127.0.0.1"
# For TORCH_LOGS: only errors of the module that warns where Triton is not installed.
QUIET_TRITON = "-torch._library.triton"
# `vllm serve` is the same program, but fails on the CPU build: it looks for a package "vllm".
MODULE = "vllm.entrypoints.openai.api_server"

OWNED = {
    "model": "is the server's model",
    "host": "is the server's host",
    "port": "is the server's port",
    "weight_transfer_config": "is ours: weights come through the server's backend",
    "logprobs_mode": "is ours: TRL's importance sampling needs `processed_logprobs`",
    "max_logprobs": "is ours: TRL may ask for any number",
    "middleware": "is ours; vLLM's own arguments, after the --, may add to it",
}
# Options that take no value and have no --no- form; False is their default.
SWITCHES = {
    "aggregate_engine_logging",
    "data_parallel_multi_port_external_lb",
    "disable_log_stats",
}
# vLLM takes the last value of an option: with these the server would not be where we look for it.
OWNED_FLAGS = ("--model", "--host", "--port", "--uds", "--ssl-keyfile", "--ssl-certfile")


@dataclass(frozen=True)
class ServerSpec:
    """A vLLM server to start.

    Attributes:
        model: a directory, or a name on the Hugging Face hub.
        engine: vLLM's engine arguments under their Python names, as in the YAML section
            `rollout.engine`. None leaves vLLM's default.
        host: address to listen on. One that other machines reach needs a QERL_SYNC_TOKEN
            (`serving.auth`) when the server is started.
        port: None or 0 take a free one.
        backend: the weight transfer backend; None for a server that gets no weights.
        extra: arguments for vLLM as on its command line; they come last and win.
    """

    model: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    host: str = LOOPBACK
    port: int | None = None
    backend: str | None = "qerl"
    extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raise ConfigError for values that vLLM could never accept."""
        check_model(self.model)
        for name in self.engine:
            if name in OWNED:
                raise ConfigError(f"engine argument {name!r} {OWNED[name]}; leave it out")
            if not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise ConfigError(f"{name!r} is no engine argument; write max_model_len: 64")
        for argument in self.extra:
            if argument.partition("=")[0].replace("_", "-") in OWNED_FLAGS:
                raise ConfigError(
                    f"{argument} is not for vLLM's own arguments: model, host and port stand "
                    "before the --, and TLS is for a proxy in front of the server"
                )


def check_model(model: str) -> None:
    """Raise ConfigError if `model` is neither a model's directory nor can be a name on the hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        require_model_directory(path)
    if path.exists():
        return
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model, re.ASCII) is not None
    if not is_name or ("/" in model and path.parent.is_dir()):
        raise ConfigError(
            f"there is no {path.absolute()}; give the directory of a model (as `save_pretrained` "
            "writes it) or its name on the Hugging Face hub"
        )


def server_argv(spec: ServerSpec, port: int) -> list[str]:
    """Return the command that serves `spec` at `port`."""
    ours = {
        "model": str(Path(spec.model).expanduser()),
        "host": spec.host,
        "port": port,
        "weight_transfer_config": None if spec.backend is None else {"backend": spec.backend},
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": -1,
        # Without a backend too: collective_rpc, sleep and the like are there all the same.
        "middleware": middleware.NAME,
    }
    # vLLM warns that this way of starting it is deprecated.
    python = [sys.executable, "-W", "ignore::DeprecationWarning"]
    return [*python, "-m", MODULE, *options({**ours, **spec.engine}), *spec.extra]


def options(arguments: Mapping[str, Any]) -> list[str]:
    """Return engine arguments in the form of vLLM's command line."""
    words = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if value is None or value == [] or (value is False and name in SWITCHES):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):  # in vLLM each takes its values one by one
            words += [f"--{flag}", *map(_text, value)]
        else:
            # In one word: a value may start with a dash.
            words.append(f"--{flag}={_text(value)}")
    return words


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def server_environment(base: Mapping[str, str]) -> dict[str, str]:
    """Return `base` with the variables that the server needs.

    `base` may be `os.environ` of a trainer or of a terminal.
    """
    defaults = {
        **ON_SHARED_CORES,
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_LOGS": QUIET_TRITON,
    }
    environment = {**defaults, **base, "VLLM_SERVER_DEV_MODE": "1", "PYTHONUNBUFFERED": "1"}
    # A trainer silences the vLLM in its own process; a server's log is a file, and wanted.
    if environment.get("VLLM_LOGGING_LEVEL") in {"WARNING", "ERROR", "CRITICAL"}:
        environment["VLLM_LOGGING_LEVEL"] = "INFO"
    # As does a colocated engine's trainer for its engine; a server's has a process of its own.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return environment


def is_loopback(host: str) -> bool:
    """Return whether a server that listens at `host` is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def local_url(host: str, port: int) -> str:
    """Return the address at which this machine reaches a server that listens at `host`."""
    reachable = {"0.0.0.0": LOOPBACK, "": LOOPBACK, "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
