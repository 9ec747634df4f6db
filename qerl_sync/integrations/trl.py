"""TRL: a callback that takes over the weight sync of an unmodified trainer.

    callback = WeightSyncCallback(policy="reorder", engine={"dtype": "float32"})
    trainer = GRPOTrainer(..., callbacks=[callback])

The callback takes over the engine that TRL builds for its trainer, while it is built
(`trl_patches`). TRL keeps deciding when to sync: it calls `trainer.vllm_generation.sync_weights`,
which this callback replaces. TRL counts steps for that, each trainer in attributes of its own, and
misses weights that change without a step. So the calls by which an engine generates are guarded
too: none passes while the engine may have other weights than the trainer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import Self

from qerl_sync.build import BACKEND, adapter_arguments, make_session
from qerl_sync.config import SyncConfig
from qerl_sync.errors import ConfigError, SyncError
from qerl_sync.integrations.eager import EagerSync, require_eager
from qerl_sync.integrations.trl_patches import (
    Takeover,
    calling_trainer,
    check_engine_arguments,
    engine_arguments,
    known_engine_arguments,
    own_process,
    require_attributes,
    without_nccl,
)
from qerl_sync.session import SyncReport, SyncSession
from qerl_sync.sources.hf import probe_of
from qerl_sync.telemetry.files import LOG, append_line
from qerl_sync.transports.joint import TrainerRanks
from qerl_sync.worker.compat import cpu_segments

__all__ = ["WeightSyncCallback", "engine_arguments", "metrics", "without_nccl"]

# Under this key the weight version travels in TRL's own checkpoints (trainer_state.json).
STATE_KEY = "qerl_sync"
# What vLLM must return for TRL's importance sampling.
LOGPROBS_MODE = "processed_logprobs"

# What is read, set or called of a trainer and of its `vllm_generation`.
OF_TRAINER = ("model", "accelerator", "args", "state", "_metrics")
OF_GENERATION = ("mode", "generate", "sync_weights", "tensor_parallel_size", "enable_sleep_mode")
# By these an engine computes with its weights: of a `vllm.LLM`, and of TRL's client of a server.
COMPUTING = ("generate", "chat", "get_sequence_logprobs")

logger = logging.getLogger(__name__)


class WeightSyncCallback(TrainerCallback):
    """Plans, orders, watches and reports every weight sync of a TRL trainer.

    Example:
        callback = WeightSyncCallback(policy="reorder", engine={"dtype": "float32"})
        trainer = GRPOTrainer(..., callbacks=[callback])
        trainer.train()
        callback.close()

    Works with every TRL trainer that generates through `trainer.vllm_generation` (GRPO, RLOO,
    Distillation, SDPO, SDFT, GOLD, IW-OPD), with an engine in the trainer's process, in its own, or
    behind a server, which TRL then does not join in an NCCL group. Each sync appends
    `sync/*` metrics to the trainer's own log.

    In several processes (torchrun, accelerate) make one in each, and close all of them: sharded
    models (FSDP2) are gathered by all. With a server the main process sends, and the others learn
    the outcome; colocated, each has an engine of its own, or `vllm_tensor_parallel_size` of them
    have one together. A sync that fails in one fails in all.

    Args:
        config: the `sync` section; alternatively its fields as keyword arguments.
        trainer: a trainer that has been built without it:
            `trainer.add_callback(WeightSyncCallback(trainer=trainer))`.
        engine: vLLM engine arguments for a colocated engine, over TRL's own, for instance
            `{"dtype": "float32", "enforce_eager": True}`.
        in_own_process: for `vllm_mode="colocate"`: start the engine in a process of its own. The
            program's main module must be importable (`if __name__ == "__main__":`).
        recorder: called with each report, for instance to write it to a file; of several
            processes, in the main one.

    Attributes:
        reports: one for each sync so far.
        session: the session, once the trainer has been built: plan, layer map, last measured
            trace, version.

    Raises:
        ConfigError: there is no such option; what `bind` raises, if a trainer is given. The
            trainer's constructor raises what `bind` raises, and `trainer.train()` a ConfigError if
            the trainer has no engine that this callback was given.
    """

    def __init__(
        self,
        config: SyncConfig | None = None,
        *,
        trainer: Any = None,
        engine: Mapping[str, Any] | None = None,
        in_own_process: bool = False,
        recorder: Callable[[SyncReport], None] | None = None,
        **options: Any,
    ) -> None:
        _refuse_misplaced(options)
        self.config = SyncConfig.given(config, options)
        self.reports: list[SyncReport] = []
        self.session: SyncSession | None = None
        self._engine = dict(engine or {})
        self._in_own_process = in_own_process
        self._recorder = recorder
        self._takeover: Takeover | None = None
        self._trainer: Any = None
        self._ranks: TrainerRanks | None = None  # where there are several
        # The step whose weights the engine has; None where they may have changed without a step.
        self._synced_step: int | None = None
        self._synced_clean = False
        self._syncing_thread: int | None = None
        self._eager: EagerSync | None = None  # with `when: eager`
        self._sent_ahead = False  # what was sent last, TRL has not asked for yet
        if trainer is not None:
            if engine or in_own_process:
                raise ConfigError(
                    f"this {type(trainer).__name__} has its engine already, which neither `engine` "
                    "nor `in_own_process` would change; give the callback to the trainer's "
                    "constructor: callbacks=[WeightSyncCallback(engine=...)]"
                )
            self.bind(trainer)

    def on_init_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Await the engine that the trainer builds next."""
        trainer = calling_trainer(self)
        self._refuse_another(trainer)
        if trainer is None or not getattr(args, "use_vllm", False):
            return
        check_engine_arguments(self._engine)
        served = getattr(args, "vllm_mode", None) == "server"
        if served and (self._engine or self._in_own_process):
            raise ConfigError(
                'with vllm_mode="server" the engine is the server\'s, which neither `engine` nor '
                "`in_own_process` would change; give its arguments to `qerl-sync serve MODEL -- "
                "--dtype float32`"
            )
        if not served:
            # Now: later the processes would have built an engine together that cannot be synced.
            num_processes = getattr(trainer.accelerator, "num_processes", 1)
            size = getattr(args, "vllm_tensor_parallel_size", 1)
            self._refuse_shared_engine(size, num_processes)
            several = num_processes > 1
            needed = adapter_arguments(trainer.model, self.config, several_ranks=several)
            self._engine = {**needed, **self._engine}
        self._stop_waiting()
        self._takeover = Takeover(trainer, self)

    def _stop_waiting(self) -> None:
        if self._takeover is not None:
            self._takeover.close()
            self._takeover = None

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Give a TRL trainer that is built in this context an engine that this callback can sync.

        A callback that is among the `callbacks` of a trainer does so by itself, and binds itself.

        Raises:
            ConfigError: vLLM's engine has no such argument; or another tensor parallel engine of
                this machine, or what is left of one, is in its way.
            CompatError: the installed TRL does not do these things where this expects them.
        """
        arguments = self._engine
        if self._in_own_process or self.config.transport in ("cuda_ipc", "shm", "tcp"):
            arguments = {"weight_transfer_config": {"backend": BACKEND}, **arguments}
        place = own_process() if self._in_own_process else without_nccl()
        with place, engine_arguments(**arguments), cpu_segments.leftovers_explained():
            yield

    def bind(self, trainer: Any) -> Self:
        """Take over the weight sync of a trainer that has been built.

        Raises:
            ConfigError: the trainer does not generate with vLLM, or with one that cannot be synced
                as configured, or its model is sharded or has adapters that can be neither served
                nor merged; or the callback syncs another trainer.
            CompatError: the installed vLLM cannot do it, or the installed TRL has other attributes.
        """
        if self._trainer is trainer:
            return self
        self._refuse_another(trainer)
        num_processes = self._num_processes(trainer)
        self._eager = self._new_eager(trainer, num_processes)
        if num_processes > 1:
            self._ranks = TrainerRanks(self.config.timeout_seconds, num_ranks=num_processes)
        # What the main process refuses, of its server for instance, all of them refuse.
        with self._ranks.together() if self._ranks else nullcontext():
            self.session = self._new_session(trainer, _generation(trainer))
        self._take_over(trainer)
        return self

    def _num_processes(self, trainer: Any) -> int:
        """Return how many processes sync together."""
        return getattr(getattr(trainer, "accelerator", None), "num_processes", 1)

    def _new_eager(self, trainer: Any, num_processes: int) -> EagerSync | None:
        if self.config.when == "lazy":
            return None
        sleeps = bool(_generation(trainer).enable_sleep_mode)
        deepspeed = bool(getattr(trainer, "is_deepspeed_enabled", False))
        require_eager(num_processes=num_processes, sleeps=sleeps, deepspeed=deepspeed)
        return EagerSync()

    @property
    def _session_config(self) -> SyncConfig:
        """Return the configuration of a session, which does not decide when it pushes."""
        return self.config.model_copy(update={"when": "lazy"})

    def _new_session(self, trainer: Any, generation: Any) -> SyncSession:
        colocated = generation.mode == "colocate"
        if colocated:
            num_processes = trainer.accelerator.num_processes
            self._refuse_shared_engine(generation.tensor_parallel_size, num_processes)
        if self.config.verify == "full" and _sleeps(generation):
            raise ConfigError(
                "sync.verify: full asks the engine after each sync, and an engine that sleeps "
                "(vllm_enable_sleep_mode) has no KV cache then; choose verify: checksum"
            )
        model = trainer.accelerator.unwrap_model(trainer.model)
        given = {
            "ranks": self._ranks,
            # FSDP1 wraps it in `train()`.
            "root": lambda: trainer.model,
            "trained": trainer.model.named_parameters,
            "probe": probe_of(model, called=lambda: trainer.model),
        }
        if colocated:
            return make_session(model, self._session_config, llm=generation.llm, **given)
        main = trainer.accelerator.is_main_process
        url = _server_of(generation.vllm_client) if main else ""
        return make_session(model, self._session_config, server_url=url, **given)

    def _refuse_shared_engine(self, size: int, num_processes: int) -> None:
        """Refuse a colocated engine of `size` tensor parallel workers that would not have one in
        each of `size` trainer processes."""
        asked, transport = f"vllm_tensor_parallel_size={size}", self.config.transport
        given = self._engine.get("tensor_parallel_size", size)
        if self._in_own_process and size == 1:
            return  # such an engine has all of its workers, however many, in its own processes
        if given != size:
            why = (
                f"TRL distributes prompts by {asked}, and `engine` has {given}; leave it out there"
            )
        elif size == 1:
            return
        elif self._in_own_process:
            why = (
                f"{asked} is for an engine in the trainer's processes; set it to 1, and with "
                f'in_own_process=True engine={{"tensor_parallel_size": {size}}}'
            )
        elif transport not in ("auto", "inproc"):
            why = (
                f"sync.transport: {transport} is for workers in other processes, and {asked} has "
                "one in each of the trainer's; choose auto"
            )
        elif num_processes % size:
            why = (
                f"{asked} is one engine with a worker in each of {size} trainer processes, and "
                f"this run has {num_processes}; start it with torchrun --nproc_per_node {size}"
            )
        else:
            return
        raise ConfigError(
            f'{why}. Or start a server (vllm_mode="server"), whose engine may be tensor parallel',
            tensor_parallel_size=size,
        )

    def _refuse_another(self, trainer: Any) -> None:
        if None not in (self._trainer, trainer) and self._trainer is not trainer:
            raise ConfigError(
                f"this {type(self).__name__} syncs a {type(self._trainer).__name__} already; make "
                "one for each trainer"
            )

    def _take_over(self, trainer: Any) -> None:
        """Sync when TRL asks for it, and before an engine computes with weights that may be old."""
        self._trainer = trainer
        generation = trainer.vllm_generation
        generation.sync_weights = self._sync
        if self._ranks is not None:
            # Where a server generates, the main process alone makes the calls that are guarded
            # below. A sync takes all processes, and all of them call `generate`.
            generation.generate = self._guarded(generation.generate)
        # TRL makes the client of a server in the main process only.
        engine = getattr(
            generation, "llm" if generation.mode == "colocate" else "vllm_client", None
        )
        for name in COMPUTING:
            if hasattr(engine, name):
                alone = self._ranks is not None
                setattr(engine, name, self._guarded(getattr(engine, name), alone=alone))

    def expect_new_weights(self) -> None:
        """Sync before the engine computes next: the model's weights have changed without an
        optimizer step.

        Called when training begins (a checkpoint may have been loaded) and ends (the best model may
        have been). Call it after changing weights yourself: torch does not count writes through
        `.data`, nor any to a sharded model. With `when: eager` call `wait` before.
        """
        self.wait()
        self._synced_step, self._sent_ahead = None, False

    def wait(self) -> None:
        """Wait for a sync that was begun ahead (`when: eager`), so that weights may change.

        The optimizer and everything that generates do so by themselves.

        Raises:
            SyncError: what that sync raised.
        """
        concluded = self._eager.conclude() if self._eager is not None else None
        if concluded is not None:
            self._note(*concluded)
            self._sent_ahead = True

    def close(self) -> None:
        """Disconnect from the engine and free shared memory, when the trainer will not generate
        again.

        Otherwise that happens when the process ends.
        """
        self._stop_waiting()
        if self._eager is not None:
            self._eager.close()
        if self.session is not None:
            self.session.close()

    def _sync(self) -> None:
        """Replace TRL's `VLLMGeneration.sync_weights`."""
        trainer, step, clean = self._trainer, self._trainer.state.global_step, self._wants_clean()
        self.wait()
        if self._sent_ahead and (self._synced_step, self._synced_clean) == (step, clean):
            self._sent_ahead = False
            return
        if _sleeps(generation := trainer.vllm_generation):
            from trl.generation.vllm_generation import empty_cache

            # Its weights' memory must be mapped before it is written to.
            empty_cache()
            generation.llm.wake_up(tags=["weights"])
            generation._llm_weights_sleeping = False
        self._note(self._push(step, clean), step, clean)

    def _push(self, step: int, clean: bool) -> SyncReport:
        assert self.session is not None
        # It asks the engine for log-probabilities (verify: full), which needs no sync before.
        self._syncing_thread = threading.get_ident()
        try:
            return self.session.push(step=step, clean=clean)
        finally:
            self._syncing_thread = None

    def _note(self, report: SyncReport, step: int, clean: bool) -> None:
        """Remember what the engine has now, and log it."""
        trainer = self._trainer
        self._synced_step, self._synced_clean, self._sent_ahead = step, clean, False
        self.reports.append(report)
        trainer.state.stateful_callbacks[STATE_KEY] = {"version": report.version}
        self._log(metrics(report))
        if self._recorder is not None and trainer.accelerator.is_main_process:
            self._recorder(report)

    def _log(self, numbers: Mapping[str, float]) -> None:
        """Append to the trainer's own metrics."""
        mode = "train" if self._trainer.model.training else "eval"
        for name, value in numbers.items():
            self._trainer._metrics[mode][name].append(value)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """With `when: eager`, send the new weights if completions are next to be made with them."""
        step = state.global_step
        ends = control.should_training_stop or step >= state.max_steps
        if self._eager is not None and not ends and self._eager.is_next(step):
            clean = self._wants_clean()
            push = partial(self._push, step, clean)
            device = next(self._trainer.model.parameters()).device
            self._eager.begin(push, step=step, clean=clean, device=device)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let no weight change while it is sent."""
        self.wait()

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Let no weight change while it is sent: the best model may be loaded next."""
        # A callback that was called after ours in `on_step_end` may have stopped the training. In
        # other epochs the sync goes on beside the trainer.
        if control.should_training_stop:
            self.wait()

    def _guarded(self, compute: Callable[..., Any], *, alone: bool = False) -> Callable[..., Any]:
        """Return the same call, preceded by a sync if the engine may have other weights than the
        trainer.

        Args:
            alone: the call is made by one of several processes, which cannot sync by itself.

        Raises:
            SyncError: such a call would compute with old weights.
        """

        def with_current_weights(*args: Any, **options: Any) -> Any:
            if self._syncing_thread == threading.get_ident():
                return compute(*args, **options)
            self.wait()
            stale = self._may_be_stale()
            if self._ranks is not None and not alone:
                # An engine that was lost is noticed by its own process only.
                stale = any(self._ranks.meet("generating", stale))
            if stale and alone:
                raise SyncError(
                    "the engine may have other weights than the trainer, and one of several "
                    "processes cannot sync alone; in every process, generate by "
                    "trainer.vllm_generation.generate, or first call its sync_weights()"
                )
            if stale:
                self._sync()
            if self._eager is not None and self._trainer.model.training:
                # Not the trainer's step: some let completions be some steps behind.
                assert self._synced_step is not None
                self._eager.asked(self._synced_step)
            return compute(*args, **options)

        return with_current_weights

    def _wants_clean(self) -> bool:
        """Return whether the engine is to have weights without noise: in evaluations, and before
        training."""
        assert self.session is not None
        return not (self._trainer.model.training and self.session.noise_is_scheduled)

    def _may_be_stale(self) -> bool:
        assert self.session is not None
        if self.reports and not self.session.current:
            logger.warning(
                "an engine was lost, restarted, or synced by another session: syncing before it "
                "generates"
            )
            return True
        if self._synced_step is None:
            return True
        if self.config.noise is not None and self._synced_clean != self._wants_clean():
            return True
        # Some trainers let completions be a number of steps behind. Below 0: a second training
        # counts from 0 again, while TRL still compares with the last sync of the first.
        behind = self._trainer.state.global_step - self._synced_step
        # Without a step: a callback that loads other weights to evaluate, and the own ones again.
        if behind == 0 and self.session.overtaken:
            return True
        return not 0 <= behind < getattr(self._trainer.args, "vllm_sync_frequency", 1)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        self._stop_waiting()
        trainer = calling_trainer(self)
        self._refuse_another(trainer)
        if self._trainer is None:
            raise _never_bound(trainer)
        if self._eager is not None:
            # Last: callbacks after ours may change weights in `on_step_end`, or the active adapter
            # for a moment (TRL's PEFTAdapterEMACallback), while the sync that ours begins reads
            # them. A new list, as transformers is iterating over the old one.
            handler = self._trainer.callback_handler
            handler.callbacks = [*(c for c in handler.callbacks if c is not self), self]
        resumed = state.stateful_callbacks.get(STATE_KEY, {}).get("version", 0)
        if self.session is not None:
            self.session.version = max(self.session.version, resumed)
            self.session.begin_run(state.max_steps, args.seed)
        self.expect_new_weights()

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        directory = self.config.record_directory
        if directory is not None and state.is_world_process_zero:
            # The syncs have files of their own.
            numbers = {
                name: value
                for name, value in (logs or {}).items()
                if isinstance(value, int | float) and not name.startswith("sync/")
            }
            # A full disk must not end a run here: the recorder has warned of it.
            with suppress(OSError):
                append_line(Path(directory) / LOG, {"step": state.global_step, **numbers})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # `load_best_model_at_end` has just put other weights into the model.
        self.expect_new_weights()


def metrics(report: SyncReport) -> dict[str, float]:
    """Return the numbers of a report under the names that they have in TRL's logs."""
    return {
        **{f"sync/seconds/{phase}": s for phase, s in report.seconds.items()},
        "sync/bytes": float(report.sent_bytes),
        "sync/unsent_bytes": float(report.unsent_bytes),
        "sync/wire_bytes": float(report.wire_bytes),
        "sync/peak_buffered_bytes": float(report.peak_buffered_bytes_measured),
        "sync/peak_buffered_bytes_predicted": float(report.peak_buffered_bytes_predicted),
        "sync/peak_pinned_bytes": float(report.peak_pinned_bytes_measured),
        "sync/peak_pinned_bytes_predicted": float(report.peak_pinned_bytes_predicted),
        "sync/open_layers": float(report.max_open_layers_measured),
        "sync/version": float(report.version),
        "sync/prediction_exact": float(report.prediction_exact),
        "sync/workers": float(len(report.workers)),
        "sync/lost_workers": float(len(report.lost)),
        **{
            f"sync/noise/{name}": float((report.noise or {})[name])
            for name in ("sigma", "arrived_sigma", "stage", "seed")
            if report.noise is not None
        },
        **{
            f"sync/mismatch/{part}": gap
            for part, gap in (report.mismatch or {}).items()
            if gap is not None
        },
    }


def _refuse_misplaced(options: Mapping[str, Any]) -> None:
    unknown = options.keys() - SyncConfig.model_fields.keys()
    if unknown and (misplaced := sorted(unknown & known_engine_arguments())):
        raise ConfigError(
            f"no options of a sync, but arguments of vLLM's engine: {', '.join(misplaced)}; give "
            f"them as engine={{{misplaced[0]!r}: ...}}"
        )


def _never_bound(trainer: Any) -> ConfigError:
    """Return why training cannot begin with a callback that has no engine to sync."""
    if trainer is not None:
        try:
            _generation(trainer)
        except ConfigError as exc:
            return exc
    kind = "trainer" if trainer is None else type(trainer).__name__
    return ConfigError(
        f"this {kind} was built without its WeightSyncCallback, and generates "
        "with an engine that is not synced; give the callback to its constructor "
        "(callbacks=[WeightSyncCallback(...)]), or call "
        "trainer.add_callback(WeightSyncCallback(trainer=trainer, ...))"
    )


def _generation(trainer: Any) -> Any:
    """Return the trainer's `VLLMGeneration`, if this callback can serve it."""
    kind = type(trainer).__name__
    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        raise ConfigError(
            f"this {kind} cannot be synced by WeightSyncCallback: {_why_not(trainer)}"
        )
    require_attributes(trainer, OF_TRAINER, trainer)
    require_attributes(generation, OF_GENERATION, trainer)
    if generation.mode == "colocate":
        require_attributes(generation, ("llm",), trainer)
        require_attributes(generation.llm, ("generate",), trainer)
    elif trainer.accelerator.is_main_process:
        require_attributes(generation, ("vllm_client",), trainer)
        client = ("base_url", "get_server_info", "generate")
        require_attributes(generation.vllm_client, client, trainer)
    if _sleeps(generation):
        from trl.generation import vllm_generation

        require_attributes(generation, ("_llm_weights_sleeping",), trainer)
        require_attributes(vllm_generation, ("empty_cache",), trainer)
    return generation


def _why_not(trainer: Any) -> str:
    """Explain why a trainer has no `vllm_generation`, and give the next step."""
    kind = type(trainer).__name__
    if hasattr(trainer, "weight_transfer"):
        return (
            "it hands its weights to an object of its own; build it with "
            f"{kind}(..., weight_transfer=transfer), where transfer = "
            "AsyncWeightTransfer(server_url) of qerl_sync.integrations.trl_async, then call "
            "transfer.bind(trainer)"
        )
    if getattr(trainer, "use_vllm", False):
        return (
            "it has code of its own for vLLM and no `vllm_generation`; train with a trainer that "
            "has one (GRPOTrainer, RLOOTrainer), or leave the callback away and let transformers "
            "generate (use_vllm=False)"
        )
    if hasattr(getattr(trainer, "args", None), "use_vllm"):
        return (
            "it does not generate with vLLM; set use_vllm=True and "
            'vllm_mode="colocate" or "server" in its config'
        )
    return (
        "it does not generate with vLLM, nor has it a setting for that; train with one that has "
        "(GRPOTrainer, RLOOTrainer), or leave the callback away"
    )


def _server_of(client: Any) -> str:
    """Return the address of TRL's server, if weights can be sent there.

    Raises:
        ConfigError: it has another weight transfer backend than ours, or none.
    """
    url: str = client.base_url
    try:
        config = client.get_server_info()
    except RuntimeError as exc:
        raise ConfigError(f"{exc} `qerl-sync serve` starts one that has all it needs") from exc
    backend = (config.get("weight_transfer_config") or {}).get("backend")
    if backend != BACKEND:
        raise ConfigError(
            f"the vLLM server at {url} has the weight transfer backend {backend!r}; restart it "
            "with --weight-transfer-config "
            f"""'{{"backend": "{BACKEND}"}}', or by `qerl-sync serve`"""
        )
    mode = (config.get("model_config") or {}).get("logprobs_mode")
    if mode != LOGPROBS_MODE:
        logger.warning(
            "the vLLM server at %s gives %s, and TRL's importance sampling needs %s: restart it "
            "with --logprobs-mode %s",
            *(url, mode, LOGPROBS_MODE, LOGPROBS_MODE),
        )
    return url


def _sleeps(generation: Any) -> bool:
    return generation.mode == "colocate" and generation.enable_sleep_mode
