"""Find options that are valid alone, and contradictory or without effect together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qerl_sync.config.violations import Violation
from qerl_sync.config.yaml_tree import value_at

# The option, its default, and the option with the only value under which it has an effect.
DEPENDENT = (
    ("spill_budget_bytes", None, "policy", "spill", "reorder"),
    ("spill_directory", None, "policy", "spill", "reorder"),
    ("mirror_budget_bytes", None, "delta", "elements", "off"),
    ("verify_tolerance", None, "verify", "full", "coverage"),
    ("recompute_running", True, "pause_mode", "keep", "keep"),
)
# Nothing is connected, paused or staged within one process. `timeout_seconds` is not among them:
# several trainer processes, each with an engine in it, wait for each other.
BETWEEN_PROCESSES = {
    "chunks_in_flight": 2,
    "trainer_address": "127.0.0.1",
    "trainer_bind": None,
    "trainer_port": 0,
    "pause_mode": "keep",
    "recompute_running": True,
}
# TRL's arguments for an engine that it makes itself, and where a server's stand.
COLOCATED_ARGUMENTS = {
    "vllm_gpu_memory_utilization": "set `rollout.engine.gpu_memory_utilization`",
    "vllm_max_model_length": "set `rollout.engine.max_model_len`",
    "vllm_tensor_parallel_size": "set `rollout.engine.tensor_parallel_size`",
    "vllm_model_impl": "set `rollout.engine.model_impl`",
    "vllm_enable_sleep_mode": "leave it out: a server does not sleep",
}
# Options with their defaults, as they are written, that others may leave without effect.
RAY_OPTIONS = {
    "workers": 2,
    "max_restarts": -1,
    "max_staleness": 0,
    "async_engine": False,
    "generate_timeout_seconds": 1800.0,
}
CLUSTER_OPTIONS = {"num_cpus": None, "object_store_bytes": "512MiB"}
# The name by which `datasets` reads each kind of local file.
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
HUB_OPTIONS = {"split": "train", "subset": None}
FILE_OPTIONS = {"prompt_column": "prompt", "answer_column": "answer"}
# Engine arguments on which TRL relies while the engine shares its process.
TRLS_IN_PROCESS = {
    "tensor_parallel_size": "the engine is in the trainer's processes; set "
    "`trainer.vllm_tensor_parallel_size`, and start as many of them, or set `rollout.mode` to "
    "subprocess or server",
    "distributed_executor_backend": "is TRL's: in colocate mode it must stay as it is",
}


def contradictions(tree: Mapping[str, Any]) -> list[Violation]:
    """Return the contradictions in a configuration, as it was written."""
    mode = value_at(tree, "rollout.mode") or "colocate"
    return [
        *_of_sync(tree, mode),
        *_of_data(tree),
        *_of_transport(tree, mode),
        *_of_server(tree, mode),
        *_of_engine(tree, mode),
        *_of_ray(tree, mode),
    ]


def _of_sync(tree: Mapping[str, Any], mode: str) -> Iterator[Violation]:
    sync = value_at(tree, "sync")
    if isinstance(sync, Mapping):
        for found in contradictions_of_sync(sync, in_process=mode == "colocate"):
            yield Violation(f"sync.{found.place}", found.message)
    merged = value_at(tree, "peft") is None or value_at(tree, "sync.lora") == "merge"
    if value_at(tree, "sync.lora_base") == "engine" and merged:
        yield Violation(
            "sync.lora_base",
            "'engine' needs an adapter that is served beside the engine's own base; train one "
            "(section `peft`), and leave `sync.lora` at auto or adapter",
        )
    intervals, steps = value_at(tree, "sync.noise.intervals"), value_at(tree, "trainer.max_steps")
    if value_at(tree, "sync.noise") and value_at(tree, "sync.noise.steps") is None:
        intervals = 10 if intervals is None else intervals
        if isinstance(steps, int) and isinstance(intervals, int) and 0 < steps < intervals:
            yield Violation(
                "sync.noise.intervals",
                f"{intervals} intervals do not fit into the {steps} steps of trainer.max_steps; "
                "each needs one",
            )
    if mode == "ray" and value_at(tree, "sync.on_failure") == "rollback":
        yield Violation(
            "sync.on_failure",
            "'rollback' is not for `rollout.mode: ray`: the engines commit without those that "
            "fail, which therefore cannot go back to the old version; choose poison",
        )


def _of_data(tree: Mapping[str, Any]) -> Iterator[Violation]:
    path, task = value_at(tree, "data.path"), value_at(tree, "data.task")
    if path is None and task is not None:
        for name in _changed(tree, "data", HUB_OPTIONS | FILE_OPTIONS):
            yield Violation(f"data.{name}", "is for `data.path`, and a `task` is made in memory")
    if path is not None and task is None:
        if value_at(tree, "data.size") not in (None, 4096):
            yield Violation(
                "data.size", "is for a `task`, and `data.path` has the rows that it has"
            )
        if isinstance(path, str) and path.endswith(tuple(FILE_FORMATS)):
            for name in _changed(tree, "data", HUB_OPTIONS):
                yield Violation(f"data.{name}", "has no effect: a single file is read as a whole")


def _changed(tree: Mapping[str, Any], section: str, defaults: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options that are given and differ from their defaults."""
    for name, default in defaults.items():
        value = value_at(tree, f"{section}.{name}")
        if value is not None and value != default:
            yield name


def _of_transport(tree: Mapping[str, Any], mode: str) -> Iterator[Violation]:
    transport = value_at(tree, "sync.transport")
    if mode == "colocate" and transport in ("cuda_ipc", "shm", "tcp"):
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
    if mode in ("colocate", "subprocess"):
        for name in _changed(tree, "rollout", {"start_timeout_seconds": 600.0}):
            yield Violation(
                f"rollout.{name}",
                f"has no effect with `rollout.mode: {mode}`: vLLM itself decides how long its "
                "engine may take to start; leave it out",
            )
    engine = value_at(tree, "rollout.engine")
    if not isinstance(engine, Mapping):
        return
    for name, instead in COLOCATED_ARGUMENTS.items():
        ours = instead.partition("rollout.engine.")[2].rstrip("`")
        if ours in engine and value_at(tree, f"trainer.{name}") is not None:
            yield Violation(
                f"trainer.{name}", f"`rollout.engine.{ours}` overrides it; leave one of them out"
            )
    if mode == "colocate":
        for name in TRLS_IN_PROCESS.keys() & engine.keys():
            yield Violation(f"rollout.engine.{name}", TRLS_IN_PROCESS[name])
    if mode == "server" and "max_logprobs" in engine:
        yield Violation(
            "rollout.engine.max_logprobs", "is ours: TRL may ask the server for any number"
        )


def _of_ray(tree: Mapping[str, Any], mode: str) -> Iterator[Violation]:
    if mode == "ray":
        if value_at(tree, "ray.address") is not None:
            for name in _changed(tree, "ray", CLUSTER_OPTIONS):
                yield Violation(
                    f"ray.{name}",
                    "is for a cluster that this run starts, and `ray.address` names one that runs; "
                    "leave one of them out",
                )
        return
    unfit = [f"rollout.{name}" for name in _changed(tree, "rollout", RAY_OPTIONS)]
    if value_at(tree, "ray"):
        unfit.append("ray")
    for path in unfit:
        yield Violation(path, f"is for `rollout.mode: ray`, and the mode is {mode}; leave it out")


def contradictions_of_sync(sync: Mapping[str, Any], *, in_process: bool = False) -> list[Violation]:
    """Return the options of the section `sync` that have no effect, or cannot be, given the others.

    Those without effect are refused, not ignored: a user who sets `verify_tolerance` and forgets
    `verify: full` would believe that the sync is verified. Places are relative to the section.

    Args:
        sync: the options; those that are missing have their defaults.
        in_process: the engine is in the trainer's process, whatever `transport` says.
    """
    violations = []
    for name, default, other, needed, otherwise in DEPENDENT:
        actual = sync.get(other) or otherwise
        if sync.get(name, default) != default and actual != needed:
            violations.append(
                Violation(
                    name,
                    f"has an effect only with `{other}: {needed}`, and `{other}` is {actual}; "
                    "leave it out, or change that",
                )
            )
    if sync.get("metrics_address", "127.0.0.1") != "127.0.0.1" and not sync.get("metrics_port"):
        violations.append(
            Violation(
                "metrics_address",
                "has an effect only with `metrics_port`; set that too, or leave it out",
            )
        )
    if in_process or sync.get("transport") == "inproc":
        violations += [
            Violation(
                name,
                "has no effect on an engine in the trainer's own process; leave it out, or choose "
                "another place for the engine (`rollout.mode`)",
            )
            for name, default in BETWEEN_PROCESSES.items()
            if sync.get(name, default) != default
        ]
    if sync.get("when") == "eager" and sync.get("verify") == "full":
        violations.append(
            Violation(
                "when",
                "`eager` syncs beside the trainer, whose model `verify: full` would use at the "
                "same time; choose `verify: checksum`, or `when: lazy`",
            )
        )
    return violations
