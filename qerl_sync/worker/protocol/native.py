"""vLLM's own nccl and ipc engines, with our plan, checks, monitor and report around the load.

    init_weight_transfer_engine  does the trainer fit? Then again, with what vLLM has there
    start_weight_update    (nothing; vLLM opens its reload here)
    update_weights         {"plan": ...}: the trainer's plan, agreed on before any byte moves
    update_weights         vLLM's own: its code receives, and loads through us
                           once the last planned tensor is loaded: finish, commit, report
    finish_weight_update   an error if tensors are outstanding

Bytes travel as vLLM sends them, in its buffers; what we have no say in is where it cuts.

nccl, packed: every buffer is allocated anew, and tensors are views of it. A buffer may end in the
    middle of a parent layer: what vLLM then holds of that layer keeps the whole old buffer alive,
    which the prediction counts (pinned bytes). Buffers are not reused, so nothing must be copied
    out of them. They are filled and loaded on streams of vLLM's own; vLLM waits for all of them
    before we finish.
nccl, not packed: a tensor of its own and a call of `load_weights` for each, which is slow.
ipc, packed: vLLM copies each tensor out of the trainer's buffer, all of a buffer at once. One call
    of `update_weights` for each buffer, so the scheduler may run in between: pause it. The model
    refuses to run until the sync has finished.
ipc, not packed: tensors are the trainer's own memory, which it keeps until after
    `finish_weight_update`.

A trainer that tells no plan (vLLM's own trainer engines) is served as well, in its own order, as
long as one update brings everything (packed ipc does not) and QERL_SYNC_TOKEN is not set here.

What goes one way only, vLLM's calls, is what both sides agree by (`wire.handshake`): protocol
and version, the token where there is one, and what the trainer expects of the engine, when it
connects; the plan with each sync. The trainer learns nothing of a worker that does not refuse.
The token authenticates the calls. It does not protect the bytes, which are vLLM's.

Errors are raised into vLLM, as its own engines do: the trainer has no other way to hear of them.
With several worker ranks vLLM does not recover from that; start its engine anew. A trainer that is
in the middle of an nccl broadcast then waits for ever: hence the agreement before it.

What was run: vLLM's own code on both sides, packed and not, with host memory in place of CUDA's
streams, handles and communicator. Nothing was run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from qerl_sync.errors import AgreementError, ConfigError, SyncError, TransportError
from qerl_sync.meta import ParamMeta, Storage, metas_from_json
from qerl_sync.options import FiniteCheck
from qerl_sync.plan.chunks import packed_storages
from qerl_sync.plan.sync_plan import SyncPlan
from qerl_sync.wire import cuda_memory
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.compat.coupling import require
from qerl_sync.worker.load.planned_loads import LoadReport, PlannedLoads
from qerl_sync.worker.load.receiver import Receiver
from qerl_sync.worker.protocol.admission import Admission
from qerl_sync.worker.protocol.identity import hello_of

# The key of an update that brings no tensor but the plan for those to come.
PLAN = "plan"


class _Planned:
    """Mix into vLLM's engines what both have in common; stands before vLLM's class."""

    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        # vLLM 0.25's engines have another contract, which would fail in the middle of a sync.
        require("vLLM's own nccl and ipc engines")
        super().__init__(config, vllm_config, device, model)  # type: ignore[call-arg]
        self._model = model
        self._receiver = Receiver(compat.EngineParts(model, vllm_config, torch.device(device)))
        self._loads = PlannedLoads(self._receiver)
        self._told_storages: dict[str, Storage] = {}
        self._admission = Admission(partial(hello_of, self._receiver, vllm_config))

    @property
    def last_report(self) -> LoadReport | None:
        """Return the report of the last sync that was finished."""
        return self._loads.last_report

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        """Return vLLM's own info; None where the trainer only introduces itself.

        Raises:
            AgreementError: the trainer does not fit, or may not.
        """
        rest = self._admission.introduced(init_dict)
        return super().parse_init_info(rest) if rest else None  # type: ignore[misc]

    def init_transfer_engine(self, init_info: Any) -> None:
        if init_info is not None:
            super().init_transfer_engine(init_info)  # type: ignore[misc]

    def start_weight_update(self) -> None:
        self._loads.abort("a new update was started before the last had finished")
        self._told_storages = {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Outside of `_aborting`: a call without a proof ends no sync of ours.
        update_info = self._admission.called(update_info)
        with self._aborting():
            if PLAN in update_info:
                self._agree(**update_info)
            else:
                self.receive_weights(self.parse_update_info(update_info))  # type: ignore[attr-defined]

    def receive_weights(self, update_info: Any) -> None:
        """Receive as vLLM does, with our `load_weights` in place of the model's."""
        if self._loads.plan is None:
            self._loads.agree_as_given(self._metas_of(update_info))
        if self._loads.outstanding is None:
            self._loads.start(self._storages())
        self.model: Any = self._loads
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = self._model
        if self._loads.outstanding == 0:
            device = torch.device(self.device)  # type: ignore[attr-defined]
            cuda_memory.synchronize(device)
            self._loads.finish()
            cuda_memory.synchronize(device)

    def finish_weight_update(self) -> None:
        with self._aborting():
            if self._loads.outstanding is not None:
                self._loads.finish()  # which names what is outstanding
        self._loads.abort("the update was finished")

    def _agree(
        self,
        plan: dict[str, Any],
        finite_check: FiniteCheck = "worker",
        storages: Mapping[str, tuple[int | str, int]] | None = None,
    ) -> None:
        self._loads.agree(SyncPlan.from_json(plan), finite_check=finite_check)
        self._told_storages = {name: Storage(*s) for name, s in (storages or {}).items()}

    def _metas_of(self, info: Any) -> list[ParamMeta]:
        triples = zip(info.names, info.dtype_names, info.shapes, strict=True)
        return metas_from_json(triples)

    def _storages(self) -> Mapping[str, Storage]:
        return {}

    @contextmanager
    def _aborting(self) -> Iterator[None]:
        """End the sync with an error of ours, poisoned if it had begun, if anything fails here."""
        try:
            yield
        except BaseException as exc:
            self._loads.abort(f"a sync failed: {exc}")
            if isinstance(exc, SyncError) or not isinstance(exc, Exception):
                raise
            raise TransportError(
                f"vLLM's {type(self).__bases__[-1].__name__} failed: {type(exc).__name__}: {exc}"
            ) from exc


class QerlNCCLWeightTransferEngine(_Planned, NCCLWeightTransferEngine):
    """The backend `qerl_nccl`, one per worker rank. See the module's text."""

    def _storages(self) -> Mapping[str, Storage]:
        if not self.packed or self._loads.plan is None:
            return {}
        return packed_storages(self._loads.plan.metas, self.packed_buffer_size_bytes)


class QerlIPCWeightTransferEngine(_Planned, IPCWeightTransferEngine):
    """The backend `qerl_ipc`, one per worker rank. See the module's text."""

    def finish_weight_update(self) -> None:
        try:
            super().finish_weight_update()
        finally:
            self._packed_importer.close()

    def _metas_of(self, info: Any) -> list[ParamMeta]:
        if self.packed:
            raise AgreementError(
                "tensors arrive buffer by buffer and the trainer has sent no plan; let it use the "
                "backend qerl_ipc (QerlIPCTrainerInitInfo), or packed=False",
                subject="plan",
            )
        return super()._metas_of(info)

    def _storages(self) -> Mapping[str, Storage]:
        return {} if self.packed else self._told_storages


class WeightReports:
    """A base for vLLM's workers, with which every client can ask for the reports:

    LLM(..., worker_extension_cls="qerl_sync.worker.protocol.native.WeightReports")
    llm.collective_rpc("last_weight_report")
    """

    def last_weight_report(self) -> dict[str, Any] | None:
        """Return `LoadReport.to_json` of this rank's last sync; None if there was none.

        Raises:
            ConfigError: the engine has another backend.
        """
        engine = getattr(self, "weight_transfer_engine", None)
        if not isinstance(engine, _Planned):
            raise ConfigError(
                f"{type(engine).__name__} keeps no report; start the engine with "
                'weight_transfer_config={"backend": "qerl_nccl"} or "qerl_ipc"'
            )
        report = engine.last_report
        return None if report is None else report.to_json()
