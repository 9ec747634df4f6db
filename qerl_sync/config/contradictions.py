"""Options that are right each by itself, and wrong or without effect together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qerl_sync.config.violations import Violation
from qerl_sync.config.yaml_tree import value_at

# TRL's arguments for an engine that it makes itself, and where a server's stand.
COLOCATED_ARGUMENTS = {
    "vllm_gpu_memory_utilization": "set `rollout.engine.gpu_memory_utilization`",
    "vllm_max_model_length": "set `rollout.engine.max_model_len`",
    "vllm_tensor_parallel_size": "set `rollout.engine.tensor_parallel_size`",
    "vllm_model_impl": "set `rollout.engine.model_impl`",
    "vllm_enable_sleep_mode": "leave it out: a server does not sleep",
}
# Engine arguments on which TRL relies while the engine shares its process.
TRLS_IN_PROCESS = {
    "tensor_parallel_size": "the trainer is one process, and so must the engine be; set "
    "`rollout.mode` to subprocess or server",
    "distributed_executor_backend": "is TRL's: in colocate mode it must stay as it is",
}


def contradictions(tree: Mapping[str, Any]) -> list[Violation]:
    """What in a configuration, as it was written, does not go together."""
    mode = value_at(tree, "rollout.mode") or "colocate"
    return [
        *_of_transport(tree, mode),
        *_of_server(tree, mode),
        *_of_engine(tree, mode),
        *_of_ray(tree, mode),
    ]


def _of_transport(tree: Mapping[str, Any], mode: str) -> Iterator[Violation]:
    transport = value_at(tree, "sync.transport")
    if mode == "colocate" and transport in ("shm", "tcp"):
        yield Violation(
            "sync.transport",
            f"{transport!r} is for workers in other processes, and with `rollout.mode: colocate` "
            "the engine is in the trainer's; choose auto, or `rollout.mode: subprocess` or server",
        )
    if transport == "ray" and mode != "ray":
        yield Violation(
            "sync.transport",
            f"'ray' is for engines in Ray actors, and `rollout.mode` is {mode}; choose auto, or "
            "`rollout.mode: ray`",
        )
    ranks = value_at(tree, "rollout.engine.tensor_parallel_size")
    apart = value_at(tree, "rollout.async_engine") or (isinstance(ranks, int) and ranks > 1)
    if transport == "ray" and mode == "ray" and apart:
        yield Violation(
            "sync.transport",
            "'ray' brings chunks to the actor's own process, and with `rollout.async_engine`, or "
            "several tensor parallel ranks, the engine has others; choose auto",
        )
    if mode in ("subprocess", "server", "ray") and transport == "inproc":
        yield Violation(
            "sync.transport",
            "'inproc' hands tensors over within one process, and with `rollout.mode: "
            f"{mode}` the engine is in another; choose auto, shm or tcp",
        )


def _of_server(tree: Mapping[str, Any], mode: str) -> Iterator[Violation]:
    url, port = value_at(tree, "rollout.server_url"), value_at(tree, "rollout.server_port")
    for name, value in (("server_url", url), ("server_port", port)):
        if value is not None and mode != "server":
            yield Violation(
                f"rollout.{name}",
                f"is for `rollout.mode: server`, and the mode is {mode}; leave it out, or change "
                "the mode",
            )
    if mode != "server":
        return
    if url is not None and port is not None:
        yield Violation(
            "rollout.server_port",
            "is for a server that this run starts, and `rollout.server_url` names one that runs; "
            "leave one of them out",
        )
    if url is not None and value_at(tree, "rollout.engine"):
        yield Violation(
            "rollout.engine",
            "is for an engine that this run starts, and the one at `rollout.server_url` has been "
            "started; leave one of them out (rollout.engine={} on the command line)",
        )
    for name, instead in COLOCATED_ARGUMENTS.items():
        if value_at(tree, f"trainer.{name}") is not None:
            yield Violation(f"trainer.{name}", f"has no effect on a server; {instead}")


def _of_engine(tree: Mapping[str, Any], mode: str) -> Iterator[Violation]:
    engine = value_at(tree, "rollout.engine")
    if not isinstance(engine, Mapping):
        return
    if mode == "colocate":
        for name in TRLS_IN_PROCESS.keys() & engine.keys():
            yield Violation(f"rollout.engine.{name}", TRLS_IN_PROCESS[name])
    if mode == "server" and "max_logprobs" in engine:
        yield Violation(
            "rollout.engine.max_logprobs", "is ours: TRL may ask the server for any number"
        )


def _of_ray(tree: Mapping[str, Any], mode: str) -> Iterator[Violation]:
    if mode == "ray":
        return
    names = (
        *("workers", "max_restarts", "max_staleness", "async_engine"),
        "generate_timeout_seconds",
    )
    for path in ("ray", *(f"rollout.{name}" for name in names)):
        if value_at(tree, path):
            yield Violation(
                path, f"is for `rollout.mode: ray`, and the mode is {mode}; leave it out"
            )
