"""Base class for a Ray actor that trains and syncs its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qerl_sync.build import make_source
from qerl_sync.config import SyncConfig
from qerl_sync.errors import ConfigError
from qerl_sync.integrations.ray.pool import WorkerPool
from qerl_sync.integrations.ray.shards import JoinedSource, Part
from qerl_sync.session import SyncReport, SyncSession
from qerl_sync.sources.base import Source
from qerl_sync.sources.hf import probe_of
from qerl_sync.transports.base import Transport


class TrainerActor:
    """Give a Ray actor `sync_weights()`.

    Example:
        @ray.remote
        class Trainer(TrainerActor):
            def __init__(self, workers):
                self.model = ...
                self.sync_to(workers, self.model, chunk_bytes="64MiB")

        ray.get(trainer.sync_weights.remote())

    Call everything from one thread.

    Where the weights are divided between several actors, all but one call `hold`, and that one is
    given their handles: `sync_to(workers, own_part, others=handles)`. Its `sync_weights()` asks the
    others for what they hold, so that they must not be in a call of their own then.
    """

    workers: WorkerPool
    sync_session: SyncSession | None = None
    _part: Part | None = None
    _steps_tell = False

    def sync_to(
        self,
        workers: WorkerPool,
        weights: Any,
        config: SyncConfig | None = None,
        *,
        others: Sequence[Any] = (),
        version: int = 0,
        **options: Any,
    ) -> None:
        """Set once where weights come from and go to. The first sync connects.

        Args:
            weights: a Hugging Face model in this process, or a `Source`.
            config: the `sync` section; or give its fields as `options`.
            others: actors that hold the rest of the weights.
            version: the last version, where a run is resumed.
        """
        from qerl_sync.integrations.ray.metrics import RayMetrics

        self.end_sync()
        config = SyncConfig.given(config, options)
        self.workers = workers
        self._pool_transport = workers.transport(config)
        source = _as_source(weights, config, None if others else self._pool_transport)
        given = dict[str, Any]()
        if others and source.adapter() is not None:
            raise ConfigError(
                "an AdapterSource sends the whole adapter, and `others` hold parts of the weights; "
                "give a PEFTSource, which merges each part, or no others"
            )
        if others:  # trained parameters and a probe of a part say nothing about the whole
            source = JoinedSource(source, others, config.timeout_seconds)
        elif not isinstance(weights, Source):
            given = {"trained": weights.named_parameters, "probe": probe_of(weights)}
        # Without the trained parameters a second sync of the same weights, for a worker that came
        # back, could not be told from one that fails to bring what has changed.
        self._steps_tell = "trained" in given
        if config.noise is not None and not self._steps_tell:
            raise ConfigError(
                "sync.noise goes by the trainer's steps, which are not known of a Source, or "
                "where `others` hold parts; give sync_to the whole model, or leave sync.noise out"
            )
        self.sync_session = SyncSession(
            source,
            self._pool_transport,
            config,
            version=version,
            observers=[RayMetrics()],
            **given,
        )

    def hold(self, weights: Any) -> None:
        """Hold a part of the weights for the actor that syncs.

        Args:
            weights: a Hugging Face model in this process, or a `Source`; of one with `held_names`
                those.
        """
        self._part = Part(_as_source(weights, SyncConfig()))

    def held(self, what: str, *arguments: Any) -> Any:
        """Call a method of `shards.Part`, for the actor that syncs."""
        if self._part is None:
            raise ConfigError("this trainer actor holds no part; call hold(weights) in it first")
        return getattr(self._part, what)(*arguments)

    def sync_weights(self, version: int | None = None) -> SyncReport:
        """Send the current weights to every worker that is up.

        Args:
            version: of these weights, larger than any before; None: the next one.

        Returns:
            The report. `lost` names the workers that were left behind, and why; they refuse to
            generate until a later sync reaches them.

        Raises:
            ConfigError: a worker has that version already, or a later one. Nothing was sent.
            SyncError: no worker took the weights, or they are not fit to be sent.
        """
        session = self.sync_session
        if session is None:
            raise ConfigError("call sync_to(workers, model) before sync_weights()")
        if version is not None:
            last = max(session.version, *self.workers.versions.values(), 0)
            if version <= last:
                raise ConfigError(
                    f"version {version} is not larger than the last one, {last}; versions only "
                    "move forwards"
                )
            session.version = version - 1
        # Workers may have more than was synced from here: they say so when they connect.
        self._pool_transport.required_version = version
        return session.push(step=(version or session.version + 1) if self._steps_tell else 0)

    def end_sync(self) -> None:
        """Disconnect from the workers; they live on. Idempotent."""
        if self.sync_session is not None:
            self.sync_session.close()
            self.sync_session = None


def _as_source(weights: Any, config: SyncConfig, transport: Transport | None = None) -> Source:
    return weights if isinstance(weights, Source) else make_source(weights, config, transport)
