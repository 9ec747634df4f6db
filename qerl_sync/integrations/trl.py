"""TRL: a callback that takes over the weight sync of an unmodified trainer in colocate mode.

    callback = WeightSyncCallback(policy="reorder")
    trainer = GRPOTrainer(..., callbacks=[callback])
    callback.bind(trainer)

TRL keeps deciding when to sync. The one seam is the attribute `sync_weights` of
`trainer.vllm_generation`, which TRL calls before it generates with weights that have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qerl_sync.config import SyncConfig
from qerl_sync.errors import CompatError, ConfigError
from qerl_sync.session import SyncReport, SyncSession
from qerl_sync.sources.hf import HFSource
from qerl_sync.transports.inproc import InProcessTransport

# Under this key the weight version travels in TRL's own checkpoints (trainer_state.json).
STATE_KEY = "qerl_sync"


class WeightSyncCallback(TrainerCallback):
    """Plans, orders, watches and reports every weight sync of a TRL trainer.

    Works with every TRL trainer that generates through `trainer.vllm_generation` (GRPO, RLOO, ...).
    Each sync appends `sync/*` metrics to the trainer's own log.

    Args:
        config: the `sync` section; alternatively its fields as keyword arguments.
        recorder: called with each report, for instance to write it to a file.

    Attributes:
        reports: one for each sync so far.
        session: the session, once bound: plan, layer map, last measured trace, version.
    """

    def __init__(
        self,
        config: SyncConfig | None = None,
        *,
        recorder: Callable[[SyncReport], None] | None = None,
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise ConfigError(
                f"give either a SyncConfig or its fields, not both ({', '.join(options)})"
            )
        self.config = config or SyncConfig.of(**options)
        self.reports: list[SyncReport] = []
        self.session: SyncSession | None = None
        self._recorder = recorder
        self._trainer: Any = None

    def bind(self, trainer: Any) -> WeightSyncCallback:
        """Take over `trainer`'s weight sync. Call it once, when the trainer has been built.

        Raises:
            ConfigError: the trainer does not run vLLM in colocate mode in one process, or its model
                is sharded or carries adapters.
            CompatError: the installed vLLM cannot do it.
        """
        generation = _colocated_generation(trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._trainer = trainer
        self.session = SyncSession(HFSource(model), InProcessTransport(generation.llm), self.config)
        generation.sync_weights = self._sync
        return self

    def _sync(self) -> None:
        """In place of TRL's `VLLMGeneration.sync_weights`."""
        trainer, session = self._trainer, self.session
        assert session is not None
        _wake_up(trainer.vllm_generation)
        report = session.push(step=trainer.state.global_step)
        self.reports.append(report)
        trainer.state.stateful_callbacks[STATE_KEY] = {"version": report.version}
        mode = "train" if trainer.model.training else "eval"
        for name, value in metrics(report).items():
            trainer._metrics[mode][name].append(value)
        if self._recorder is not None:
            self._recorder(report)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.session is None:
            raise ConfigError(
                "WeightSyncCallback is not bound; call `callback.bind(trainer)` after building the "
                "trainer"
            )
        resumed = state.stateful_callbacks.get(STATE_KEY, {}).get("version", 0)
        self.session.version = max(self.session.version, resumed)
        self._expect_new_weights()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # `load_best_model_at_end` has just put other weights into the model.
        self._expect_new_weights()

    def _expect_new_weights(self) -> None:
        """TRL syncs when `global_step` moves, and would miss weights that change without it: a
        resumed or second training, the best model loaded at the end."""
        self._trainer._last_loaded_step = -1


def metrics(report: SyncReport) -> dict[str, float]:
    """The numbers of a report under the names they have in TRL's logs."""
    return {
        **{f"sync/seconds/{phase}": s for phase, s in report.seconds.items()},
        "sync/bytes": float(report.sent_bytes),
        "sync/peak_buffered_bytes": float(report.peak_buffered_bytes_measured),
        "sync/peak_buffered_bytes_predicted": float(report.peak_buffered_bytes_predicted),
        "sync/peak_pinned_bytes": float(report.peak_pinned_bytes_measured),
        "sync/peak_pinned_bytes_predicted": float(report.peak_pinned_bytes_predicted),
        "sync/open_layers": float(report.max_open_layers_measured),
        "sync/version": float(report.version),
    }


@contextmanager
def engine_arguments(**arguments: Any) -> Iterator[None]:
    """While open, the engine that a TRL trainer builds gets these vLLM engine arguments too.

    TRL fixes the arguments of its colocated `LLM` and leaves no way to set `dtype`,
    `enforce_eager`, `quantization` and others. Wrap the construction of the trainer in it; the
    callback itself does not need it.

    Raises:
        CompatError: the installed TRL does not build its engine where this expects it.
    """
    from trl.generation import vllm_generation

    original = getattr(vllm_generation, "LLM", None)
    if original is None:
        raise CompatError(
            "trl.generation.vllm_generation has no LLM: vLLM cannot be imported there, or this TRL "
            "builds its engine elsewhere; install TRL 1.16 and vLLM 0.31"
        )

    def build(**given: Any) -> Any:
        return original(**{**given, **arguments})

    vllm_generation.LLM = build
    try:
        yield
    finally:
        vllm_generation.LLM = original


def _colocated_generation(trainer: Any) -> Any:
    """The trainer's `VLLMGeneration`, if it is one that this callback can serve."""
    kind = type(trainer).__name__
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        raise ConfigError(
            f"this {kind} does not generate with vLLM; set use_vllm=True and "
            'vllm_mode="colocate" in its config'
        )
    if generation.mode != "colocate":
        raise ConfigError(
            f'this {kind} runs vLLM in {generation.mode!r} mode; set vllm_mode="colocate"'
        )
    processes = trainer.accelerator.num_processes
    if processes != 1 or generation.tensor_parallel_size != 1:
        raise ConfigError(
            f"this {kind} runs in {processes} processes with tensor parallel size "
            f"{generation.tensor_parallel_size}; this callback syncs one process with one engine. "
            "Train in one process, or keep TRL's own weight sync"
        )
    return generation


def _wake_up(generation: Any) -> None:
    """Sleeping engines have freed their weights' memory: map it before it is written to."""
    if generation.enable_sleep_mode:
        from trl.generation.vllm_generation import empty_cache

        empty_cache()
        generation.llm.wake_up(tags=["weights"])
        generation._llm_weights_sleeping = False
