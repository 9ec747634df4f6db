"""Sync TRL's asynchronous trainers through their argument `weight_transfer`.

transfer = AsyncWeightTransfer(server_url, policy="reorder")
trainer = AsyncGRPOTrainer(..., weight_transfer=transfer)
transfer.bind(trainer)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

from qerl_sync.build import make_session
from qerl_sync.config import SyncConfig
from qerl_sync.errors import ConfigError
from qerl_sync.integrations.trl import OF_TRAINER, metrics
from qerl_sync.integrations.trl_patches import require_attributes
from qerl_sync.session import SyncReport, SyncSession
from qerl_sync.sources.hf import probe_of

if TYPE_CHECKING:
    import torch


class AsyncWeightTransfer:
    """Sync the weights of TRL's `AsyncGRPOTrainer` or `AsyncDistillationTrainer`, as its
    `weight_transfer`.

    Implements TRL's `WeightTransferProtocol`; each sync is planned, measured and reported.

    TRL calls it in the main process, when it wants to sync. Requests in flight continue afterwards.
    An adapter travels as `sync.lora` says, and is never merged into the trainer's weights.

    Args:
        server_url: the vLLM server, which must have the weight transfer backend `qerl`.
        config: the `sync` section; alternatively its fields as keyword arguments.
        recorder: called with each report.

    Attributes:
        reports: one for each sync so far.
        session: from the beginning of the training to its end.
    """

    def __init__(
        self,
        server_url: str,
        config: SyncConfig | None = None,
        *,
        recorder: Callable[[SyncReport], None] | None = None,
        **options: Any,
    ) -> None:
        self.server_url = server_url
        self.config = SyncConfig.given(config, options)
        self.reports: list[SyncReport] = []
        self.session: SyncSession | None = None
        self._recorder = recorder
        self._trainer: Any = None

    def bind(self, trainer: Any) -> AsyncWeightTransfer:
        """Set the trainer whose weights are sent. Call it once, when the trainer has been built, in
        every process.

        Raises:
            ConfigError: the trainer was not built with this object.
            CompatError: the installed TRL has other attributes.
        """
        kind = type(trainer).__name__
        if not hasattr(trainer, "weight_transfer"):
            raise ConfigError(
                f"{kind} takes no weight_transfer: AsyncWeightTransfer is for AsyncGRPOTrainer and "
                "AsyncDistillationTrainer; use WeightSyncCallback for those with vllm_generation"
            )
        require_attributes(trainer, OF_TRAINER, trainer)
        # TRL keeps it in the main process only.
        if trainer.accelerator.is_main_process and trainer.weight_transfer is not self:
            raise ConfigError(
                f"this {kind} was built without this AsyncWeightTransfer, and syncs by "
                f"{type(trainer.weight_transfer).__name__}; build it with "
                f"{kind}(..., weight_transfer=transfer), and bind that one"
            )
        model = trainer.accelerator.unwrap_model(trainer.model)
        if hasattr(model, "merge_adapter"):
            require_attributes(trainer, ("_sync_weight_merged",), trainer)
            trainer._sync_weight_merged = _without_merging(trainer._sync_weight_merged, model)
        self._trainer = trainer
        return self

    def init_weight_transfer(self) -> None:
        """Raise ConfigError if no trainer is bound, or its model is sharded or has adapters that
        can be neither served nor merged."""
        if self._trainer is None:
            raise ConfigError(
                "AsyncWeightTransfer is not bound; call `transfer.bind(trainer)` after building "
                "the trainer"
            )
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        # AsyncGRPOTrainer's own attention takes packed trees of completions, not a prompt.
        probe = probe_of(model, attention="eager")
        given = {"trained": model.named_parameters, "probe": probe}
        self.session = make_session(model, self.config, server_url=self.server_url, **given)

    def pause(self) -> None:
        """Do nothing: the sync pauses the server itself, when its first bytes are ready."""

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Sync. Ignore TRL's stream: the plan takes the same weights in another order."""
        if self.session is None:
            raise ConfigError(
                "TRL asks for a sync before the training has begun or after it has ended; an "
                "asynchronous trainer connects once, so build a new one for a second train()"
            )
        state = self._trainer.state
        self.session.begin_run(state.max_steps, self._trainer.args.seed)
        report = self.session.push(step=state.global_step)
        self.reports.append(report)
        for name, value in metrics(report).items():
            self._trainer._metrics["train"][name].append(value)
        if self._recorder is not None:
            self._recorder(report)

    def resume(self) -> None:
        """Do nothing: the sync has already resumed the server."""

    def destroy(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None


def _without_merging(sync: Callable[..., Any], model: Any) -> Callable[..., Any]:
    """Return TRL's sync for a PEFT model, without its merge.

    TRL merges the adapter into the weights before it calls `send_weights`, and out of them after
    it. In bfloat16 each time rounds the base once more, and base and adapter are not sent alone.
    On all ranks alike, since the base must stay the same on all.
    """

    @wraps(sync)
    def unmerged(*given: Any, **options: Any) -> Any:
        own = vars(model)
        own["merge_adapter"] = own["unmerge_adapter"] = lambda *_, **__: None
        try:
            return sync(*given, **options)
        finally:
            del own["merge_adapter"], own["unmerge_adapter"]

    return unmerged
