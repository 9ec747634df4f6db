"""vLLM's `WeightTransferEngine`: its calls only give our session the worker's thread.

    init_weight_transfer_engine   connect to the trainer, agree on how bytes travel
    start_weight_update           (nothing)
    update_weights                serve the trainer's requests: a whole sync, or a dry run
    finish_weight_update          (nothing)

A whole sync happens within one call of `update_weights`: the scheduler never runs a step between
two layers of different versions, paused or not.

Anybody may make these calls, with anything in them, and each reaches all ranks. vLLM takes the
first rank's exception and leaves the answers of the ranks after it in their queues, where its next
call would find them: the last rank alone raises, whatever the exception.
"""

from __future__ import annotations

import logging
from typing import Any, cast

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from qerl_sync.errors import ConfigError, SyncError
from qerl_sync.wire import cuda_memory
from qerl_sync.wire import messages as say
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.compat.lora import calling_runner
from qerl_sync.worker.load.receiver import Receiver
from qerl_sync.worker.protocol.identity import hello_of
from qerl_sync.worker.protocol.session import WorkerSession

logger = logging.getLogger(__name__)


class QerlInitInfo(dict[str, Any], WeightTransferInitInfo):
    """Hold a trainer's request to connect: see `wire.handshake.ConnectCall`."""


class QerlUpdateInfo(dict[str, Any], WeightTransferUpdateInfo):
    """Hold a trainer's request for the worker's thread: see `wire.handshake.ServeCall`."""


class QerlWeightTransferEngine(WeightTransferEngine):
    """One per worker rank. See the module's text."""

    init_info_cls = QerlInitInfo
    update_info_cls = QerlUpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        device = torch.device(device)
        runner = calling_runner(model)
        self._receiver = Receiver(compat.EngineParts(model, vllm_config, device, runner))
        self._session = WorkerSession(self._receiver, device, self._hello)
        self._update_open = False

    def parse_init_info(self, init_dict: Any) -> QerlInitInfo:
        """Take any form. `WorkerSession` refuses wrong ones: what is raised here would be raised on
        all ranks."""
        return cast("QerlInitInfo", init_dict)

    def parse_update_info(self, update_dict: Any) -> QerlUpdateInfo:
        """Take any form, as `parse_init_info`."""
        return cast("QerlUpdateInfo", update_dict)

    def init_transfer_engine(self, init_info: QerlInitInfo) -> None:
        """Connect to every rank of the trainer."""
        try:
            self._session.open(init_info)
        except Exception as exc:
            self._refuse("this worker does not connect to the trainer", exc)

    def start_weight_update(self) -> None:
        self._update_open = True

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base class's: it ends with a device synchronisation, which CPU workers lack.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: QerlUpdateInfo) -> None:
        """Serve the trainer's requests until it sends End. Failures are reported to it alone."""
        try:
            self._session.serve(update_info)
            cuda_memory.synchronize(torch.device(self.device))
        except Exception as exc:
            # vLLM ends the update of a rank that raises; on the other ranks it stays open.
            self._update_open = not self._is_last_rank
            self._refuse("this worker does not take the update", exc)

    def finish_weight_update(self) -> None:
        self._update_open = False

    def shutdown(self) -> None:
        self._session.close()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Raise ConfigError: vLLM before 0.28 asks this class to send, and it has no plan."""
        raise ConfigError(
            "the backend qerl does not send by vLLM's trainer_send_weights(); make a SyncSession "
            "with a RemoteTransport and call its push()"
        )

    def _hello(self) -> say.Hello:
        return hello_of(self._receiver, self.vllm_config, update_open=self._update_open)

    @property
    def _is_last_rank(self) -> bool:
        return bool(self.parallel_config.rank == self.parallel_config.world_size - 1)

    def _refuse(self, what: str, exc: Exception) -> None:
        """Raise to the caller, on one rank alone: vLLM's collective calls take one answer."""
        expected = isinstance(exc, SyncError)
        text = f"{what}: {exc}" if expected else f"{what}: {type(exc).__name__}: {exc}"
        logger.error(text, exc_info=not expected)
        if self._is_last_rank:
            raise ValueError(text) from exc
