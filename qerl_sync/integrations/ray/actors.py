"""The Ray actor that hosts a vLLM engine. Nothing here imports Ray: `WorkerPool.start` makes it
remote.

Its calls run one after the other in one thread, the engine's. Those of `CONTROL` have threads of
their own, so that they are answered while the engine generates or loads. `in_flight.py` has an
actor that generates beside a sync.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from qerl_sync.engines.base import PauseMode
from qerl_sync.engines.environment import ON_SHARED_CORES
from qerl_sync.engines.ray_actor import CONTROL as CONTROL
from qerl_sync.errors import AgreementError, PoisonedError
from qerl_sync.worker.protocol import mailbox as mailbox

logger = logging.getLogger(__name__)

# How often an actor looks whether the process of its engine lives.
LOOK_SECONDS = 0.5

# Text, token ids, or vLLM's own mappings, which may hold images.
Prompts = Sequence[str] | Sequence[Sequence[int]] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rollout:
    """One completion.

    Attributes:
        logprobs: of each completion token, under the engine's weights.
        version: of the weights that the worker had when it was asked: no token is older.
        worker: the actor's name.
        last_version: of the weights that its last token comes from. Larger than `version` only
            where requests in flight go on after a sync (`AsyncRolloutActor`).
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    text: str
    version: int
    worker: str
    last_version: int


class RolloutActor:
    """Host a vLLM engine in a Ray actor: generate, and receive weights.

    Example:
        engine = {"model": path, "dtype": "float32", "enforce_eager": True}
        pool = WorkerPool.start(2, engine, actor=RolloutActor, options={"num_gpus": 1})
        ray.get(trainer.sync_weights.remote())  # a TrainerActor that has the pool
        rollouts = pool.generate([[1, 2, 3]], {"max_tokens": 8})

    It refuses to generate until it has had a full sync: an actor that Ray restarts is back on the
    weights that it was started with.

    Args:
        engine: vLLM's engine arguments, as they are; `model` at least.
        name: of the actor, in logs, rollouts and errors.
        environment: variables set before vLLM is imported. Unless VLLM_ENABLE_V1_MULTIPROCESSING
            is among them, the engine runs in the actor's process (with several tensor parallel
            ranks, in processes of its own). On a CPU it gets a cache of 1 GiB and no cores of its
            own unless VLLM_CPU_KVCACHE_SPACE and VLLM_CPU_OMP_THREADS_BIND say otherwise.
        serve_initial_weights: generate before the first sync too, with version 0.

    Attributes:
        CONCURRENCY: Ray's concurrency groups, and how many threads each has.
    """

    CONCURRENCY: ClassVar[Mapping[str, int]] = {CONTROL: 2}

    def __init__(
        self,
        engine: Mapping[str, Any],
        *,
        name: str = "rollout",
        environment: Mapping[str, str] | None = None,
        serve_initial_weights: bool = False,
    ) -> None:
        self.name = name
        self.version = 0
        self._serves = serve_initial_weights
        self._paused = False
        os.environ.update(environment or {})
        apart = "1" if self._is_apart(engine) else "0"
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", apart)
        # Without it the second engine of a node finds no memory and does not start.
        for variable, value in ON_SHARED_CORES.items():
            os.environ.setdefault(variable, value)
        self.llm = self._start(engine)
        self._client = self._control(self.llm)
        core = self._core(self.llm)
        if hasattr(core, "resources"):  # it has a process of its own

            def end_with_engine() -> NoReturn:
                # Ray does not notice that the engine is dead; ending the actor makes it restart
                # both.
                while not core.resources.engine_dead:
                    time.sleep(LOOK_SECONDS)
                logger.error("the engine's process has ended, and the actor with it")
                os._exit(1)

            threading.Thread(target=end_with_engine, name="watch", daemon=True).start()

    def __repr__(self) -> str:
        """Return the text that Ray prints before each line of the actor's log."""
        return self.name

    def _is_apart(self, engine: Mapping[str, Any]) -> bool:
        """Return whether the engine has processes of its own by default."""
        return world_size(engine) > 1

    def _start(self, engine: Mapping[str, Any]) -> Any:
        from vllm import LLM

        return LLM(**with_defaults(engine))

    def _control(self, llm: Any) -> Any:
        from qerl_sync.engines.llm import LLMClient

        logging.getLogger("qerl_sync").setLevel(logging.INFO)
        return LLMClient(llm)

    def _core(self, llm: Any) -> Any:
        """Return vLLM's client of its engine core."""
        return getattr(getattr(llm, "llm_engine", None), "engine_core", None)

    # ---- generation

    def generate(
        self,
        prompts: Prompts,
        sampling: Any = None,
        required_version: int = 0,
    ) -> list[Rollout]:
        """Return completions of all prompts, `sampling["n"]` of each, in order.

        Args:
            sampling: vLLM's `SamplingParams`, or their fields as a mapping.
            required_version: the oldest weights that will do.

        Raises:
            PoisonedError: the weights are not to be used: no sync yet, one that is under way, or
                one that failed.
            AgreementError: they are older than required.
        """
        self._require(required_version)
        from vllm import SamplingParams

        begun = self.version
        given = [
            prompt if isinstance(prompt, str | Mapping) else {"prompt_token_ids": list(prompt)}
            for prompt in prompts
        ]
        if not isinstance(sampling, SamplingParams):
            sampling = SamplingParams(**{"logprobs": 0, **(sampling or {})})
        return [
            Rollout(
                prompt_ids=list(output.prompt_token_ids),
                completion_ids=list(completion.token_ids),
                logprobs=[
                    step[token].logprob
                    for token, step in zip(
                        completion.token_ids, completion.logprobs or [], strict=False
                    )
                ],
                text=completion.text,
                version=begun,
                last_version=ended,
                worker=self.name,
            )
            for output, ended in self._complete(given, sampling)
            for completion in output.outputs
        ]

    def _complete(self, prompts: list[Any], sampling: Any) -> list[tuple[Any, int]]:
        """Return vLLM's output for each prompt, and the weight version when it was complete."""
        try:
            outputs = self.llm.generate(prompts, sampling, use_tqdm=False)
        except BaseException:
            # An engine in this process keeps the requests of a call that failed, and would run them
            # with the next call: drop them. An engine in a process of its own would stay paused.
            if self._client.in_process:
                self._client.pause("abort")
            raise
        return [(output, self.version) for output in outputs]

    def _require(self, version: int) -> None:
        # Between two calls of one sync too: the weights may be new, caches and version old.
        if self._paused:
            raise PoisonedError(
                f"{self.name} does not generate: a sync is under way, or one has failed. Ask again "
                "when it is over, or sync in full"
            )
        if not self.version and not self._serves:
            raise PoisonedError(
                f"{self.name} has not been synced since it started, and its weights are those that "
                "it was started with; sync first (`trainer.sync_weights()`)"
            )
        if self.version < version:
            raise AgreementError(
                f"{self.name} has weight version {self.version}, and {version} is required; "
                "sync it first",
                subject="weight_version",
            )

    # ---- what a trainer calls: vLLM's four methods, and those of engines.base.EngineClient

    def init_weight_transfer_engine(self, request: Any) -> None:
        self._client.init_weight_transfer_engine(_payload(request, "init_info"))

    def start_weight_update(self) -> None:
        self._client.start_weight_update()

    def update_weights(self, request: Any) -> None:
        self._client.update_weights(_payload(request, "update_info"))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish the update. A given version means that the sync has been committed."""
        self._client.finish_weight_update(weight_version)
        if weight_version is not None:
            self.update_weight_version(weight_version)

    def update_weight_version(self, weight_version: str) -> None:
        self.version = int(weight_version)

    def pause(self, mode: PauseMode) -> None:
        self._paused = True
        self._client.pause(mode)

    def resume(self) -> None:
        self._client.resume()
        self._paused = False

    def reset_caches(self, running: bool) -> bool | None:
        emptied: bool | None = self._client.reset_caches(running=running)
        return emptied

    def world_size(self) -> int:
        """Return the number of workers, those of all data parallel replicas included."""
        return int(self._client.world_size())

    def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Return each token's log-probability, from the second on. For `sync.verify: full`."""
        return list(self._client.prompt_logprobs(token_ids))

    # ---- answered at any time (concurrency group CONTROL)

    def status(self) -> dict[str, Any]:
        """Return the actor's identity, its packages' versions and its weight version.

        The actor answers once the engine has started.
        """
        import ray

        from qerl_sync import __version__

        context = ray.get_runtime_context()
        return {
            "qerl-sync": __version__,
            "name": self.name,
            "version": self.version,
            "pid": os.getpid(),
            "node": context.get_node_id(),
        }

    def deliver(self, key: str, index: int, chunk: Any) -> bool:
        """Pass a chunk from Ray's object store to the worker in this process.

        Return False if no worker waits for it.
        """
        return mailbox.put(key, index, chunk)


def world_size(engine: Mapping[str, Any]) -> int:
    """Return how many ranks an engine with these arguments has."""
    sizes = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
    return math.prod(int(engine.get(size) or 1) for size in sizes)


def with_defaults(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Return vLLM's engine arguments, with the defaults that an engine in an actor needs."""
    needed: dict[str, Any] = {"weight_transfer_config": {"backend": "qerl"}}
    if world_size(engine) > 1:
        # vLLM would find that it is in a placement group, and take actors of its own for its ranks.
        needed["distributed_executor_backend"] = "mp"
    return {**needed, **engine}


def _payload(request: Any, name: str) -> dict[str, Any]:
    """Return the request's fields: vLLM's clients send dataclasses, ours plain dictionaries."""
    found = request[name] if isinstance(request, Mapping) else getattr(request, name)
    return dict(found)
