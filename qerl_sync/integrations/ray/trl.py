"""Run TRL's trainers with rollout actors: a callback starts, syncs and ends them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qerl_sync.build import make_source
from qerl_sync.config import SyncConfig
from qerl_sync.errors import ConfigError, TransportError
from qerl_sync.integrations.ray.cluster import require_ray, require_room_for_chunks
from qerl_sync.integrations.ray.llm import Announcer, PooledLLM
from qerl_sync.integrations.ray.metrics import RayMetrics
from qerl_sync.integrations.ray.pool import WorkerPool
from qerl_sync.integrations.trl import WeightSyncCallback
from qerl_sync.integrations.trl_patches import replaced
from qerl_sync.session import SyncReport, SyncSession
from qerl_sync.sources.hf import probe_of

logger = logging.getLogger(__name__)

# What TRL asks of an engine that shares its process, and means nothing to one in an actor.
IN_PROCESS_ONLY = ("distributed_executor_backend",)
# How often one sync is tried when it loses all workers, and how long to wait in between.
TRIES = 5
PAUSE_SECONDS = 2.0


class PoolSyncCallback(WeightSyncCallback):
    """Do what `WeightSyncCallback` does, with rollout actors in place of TRL's engine.

        callback = PoolSyncCallback(workers=2, engine={"dtype": "float32"})
        args = GRPOConfig(use_vllm=True, vllm_mode="colocate", ...)
        trainer = GRPOTrainer(..., args=args, callbacks=[callback])

    Each sync appends `sync/workers`, and each log the staleness of what was trained on.

    Args:
        workers: how many actors.
        max_staleness: see `RolloutConfig`.
        engine: vLLM engine arguments of each actor, over TRL's own.
        pool: arguments of `WorkerPool.start`.

    Raises:
        ConfigError: `when: eager` with a staleness.
    """

    def __init__(
        self,
        config: SyncConfig | None = None,
        *,
        workers: int = 2,
        max_staleness: int = 0,
        engine: Mapping[str, Any] | None = None,
        pool: Mapping[str, Any] | None = None,
        recorder: Callable[[SyncReport], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, engine=engine, recorder=recorder, **options)
        if max_staleness and self.config.when == "eager":
            raise ConfigError(
                f"sync.when: eager: with max_staleness={max_staleness} actors generate "
                "beside the trainer, and such a sync would come in between; choose sync.when: "
                "lazy, or max_staleness=0"
            )
        self._count = workers
        self._max_staleness = max_staleness
        self._pool_arguments = dict(pool or {})
        self.llm: PooledLLM | None = None

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Give rollout actors to a TRL trainer that is built for `vllm_mode="colocate"` in this
        context.
        """
        from trl.generation import vllm_generation

        def start(**given: Any) -> PooledLLM:
            if given.get("enable_sleep_mode"):
                raise ConfigError(
                    "rollout actors do not sleep: they share no memory with the trainer; leave "
                    "vllm_enable_sleep_mode out"
                )
            trls = {name: v for name, v in given.items() if name not in IN_PROCESS_ONLY}
            engine = {**trls, **self._engine}
            node = require_ray().get_runtime_context().get_node_id()
            require_room_for_chunks(self.config, {node})
            pool = WorkerPool.start(self._count, engine, **self._pool_arguments)
            length, staleness = engine.get("max_model_len"), self._max_staleness
            self.llm = PooledLLM(pool, max_model_len=length, max_staleness=staleness)
            return self.llm

        with replaced(vllm_generation, "LLM", lambda llm: start):
            yield

    def _refuse_shared_engine(self, size: int, num_processes: int) -> None:
        """Refuse nothing: each actor's engine is its own, with as many workers as `engine` says."""

    def _num_processes(self, trainer: Any) -> int:
        return 1  # actors have one trainer

    def _new_session(self, trainer: Any, generation: Any) -> SyncSession:
        llm = getattr(generation, "llm", None)
        if not isinstance(llm, PooledLLM):
            raise ConfigError(
                "this trainer has no rollout actors; build it with use_vllm=True, "
                'vllm_mode="colocate" and callbacks=[callback]'
            )
        model = trainer.accelerator.unwrap_model(trainer.model)
        transport = llm.pool.transport(self.config)
        return SyncSession(
            make_source(model, self.config, transport),
            transport,
            self._session_config,
            trained=trainer.model.named_parameters,
            probe=probe_of(model),
            observers=[RayMetrics()],
        )

    def _take_over(self, trainer: Any) -> None:
        super()._take_over(trainer)
        generation = trainer.vllm_generation
        generation.llm.recover = self._sync
        generation.generate = self._noting(generation.generate)
        if self._max_staleness:
            self._generate_ahead(trainer)

    def close(self) -> None:
        """End the actors."""
        super().close()
        if self.llm is not None:
            self.llm.pool.stop()
            self.llm = None

    def _sync(self) -> None:
        """Sync, even if all workers are down: wait for those that Ray restarts."""
        assert self.llm is not None
        for others in reversed(range(TRIES)):
            self.llm.pool.await_some(self._pool_arguments.get("start_seconds", 600.0))
            try:
                return super()._sync()
            except TransportError as exc:
                # Before the first sync the engines themselves are at fault: do not try again.
                if not self.reports or not others:
                    raise
                logger.warning("the sync has lost all workers, and is done again: %s", exc)
            time.sleep(PAUSE_SECONDS)

    def _noting(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """Generate, and log the staleness of the completions with TRL's metrics."""

        def generate_and_note(*args: Any, **kwargs: Any) -> Any:
            found = generate(*args, **kwargs)
            assert self.llm is not None
            newest = self.llm.pool.newest_version
            behind = [newest - rollout.version for rollout in self.llm.last]
            mean = sum(behind) / len(behind)
            self._log({"rollout/staleness/max": float(max(behind)), "rollout/staleness/mean": mean})
            return found

        return generate_and_note

    def _generate_ahead(self, trainer: Any) -> None:
        """Announce the prompts of coming batches to the pool before TRL asks for them."""
        take = trainer.get_batch_samples
        every = trainer.args.steps_per_generation * trainer.num_iterations

        def expect(batch: list[dict[str, Any]]) -> None:
            assert self.llm is not None
            ids, *_ = trainer._tokenize_prompts([row["prompt"] for row in batch])
            self.llm.expect(ids)

        announcer = Announcer(expect, ahead=self._max_staleness, every=every)
        trainer.get_batch_samples = lambda batches, *args: take(announcer.of(batches), *args)
