"""The trainer's side of `qerl_nccl` and `qerl_ipc`: vLLM's own engines, in plan order.

    init = QerlNCCLTrainerInitInfo(rank=0, master_address=..., master_port=..., world_size=...)
    engine = WeightTransferTrainerFactory.trainer_init(
        init, client=client, source=PlannedSource(source, plan)
    )
    engine.send_weights()

What was run, and what not, stands in `worker.protocol.native`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

from typing_extensions import Self

from qerl_sync import __version__
from qerl_sync.engines.base import as_engine_client
from qerl_sync.errors import ConfigError
from qerl_sync.integrations.vllm import PlannedSource
from qerl_sync.options import FiniteCheck
from qerl_sync.wire import handshake as say
from qerl_sync.wire.handshake import Expected
from qerl_sync.wire.messages import TrainerSession
from qerl_sync.wire.tokens import TOKEN_VARIABLE
from qerl_sync.worker.compat.coupling import require
from qerl_sync.worker.protocol import plugin

require("vLLM's own nccl and ipc engines")

# Only now: what an older vLLM lacks is named, and is no ImportError.
from vllm.distributed.weight_transfer.base import WeightSource  # noqa: E402
from vllm.distributed.weight_transfer.ipc_engine import (  # noqa: E402
    IPCTrainerInitInfo,
    IPCTrainerWeightTransferEngine,
)
from vllm.distributed.weight_transfer.nccl_engine import (  # noqa: E402
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
)

plugin.register()


@dataclass
class QerlNCCLTrainerInitInfo(NCCLTrainerInitInfo):
    """vLLM's parameters, and ours.

    Attributes:
        check_finite: see `SyncConfig`. Workers look where the source cannot.
        expected: what every worker must say of itself, or refuses: of `model`, `dtype`,
            `quantization`, `tensor_parallel_size` and the other parallel sizes, `vllm`, `torch`,
            as many as are known, such as {"dtype": "bfloat16", "tensor_parallel_size": 2}.
    """

    backend: ClassVar[str] = "qerl_nccl"

    check_finite: bool = True
    expected: Expected = field(default_factory=dict)


@dataclass
class QerlIPCTrainerInitInfo(IPCTrainerInitInfo):
    """vLLM's parameters, and ours: see `QerlNCCLTrainerInitInfo`."""

    backend: ClassVar[str] = "qerl_ipc"

    check_finite: bool = True
    expected: Expected = field(default_factory=dict)


class AgreeingClient:
    """Send the workers the trainer's handshake, and the plan with the start of an update.

    A refusal is raised there, before vLLM sends a byte: later it would leave the trainer in a
    broadcast that no worker joins. Where QERL_SYNC_TOKEN is set when this is made, each call proves
    that the trainer knows it.

    Attributes:
        finite_check: which side looks for NaN in the next update.
    """

    def __init__(self, client: Any, source: PlannedSource, expected: Expected) -> None:
        self._client = as_engine_client(client)
        self._source = source
        self._expected = expected
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        self._session = TrainerSession.begin()
        self._num_updates = 0
        self.finite_check: FiniteCheck = "worker"

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        said = say.introduction(init_info, __version__, self._expected, self._token, self._session)
        self._num_updates = 0
        self._client.init_weight_transfer_engine({**init_info, say.KEY: said.model_dump()})

    def start_weight_update(self) -> None:
        self._client.start_weight_update()
        storages = self._source.source.storages()
        self.update_weights(
            {
                "plan": self._source.plan.to_json(),
                "finite_check": self.finite_check,
                "storages": {name: [s.key, s.nbytes] for name, s in storages.items()},
            }
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._num_updates += 1
        said = say.call(self._num_updates, self._token, self._session.id)
        self._client.update_weights({**update_info, say.KEY: said.model_dump()})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._client.finish_weight_update(weight_version)


class _Agreeing:
    """The part that both engines share; it precedes vLLM's class among the bases."""

    client: AgreeingClient
    source: PlannedSource
    _check_finite = True

    @classmethod
    def trainer_init(
        cls, init_info: Any, *, client: Any, source: WeightSource | None = None
    ) -> Self:
        """Connect as vLLM's engine does.

        Raises:
            ConfigError: the source has no plan.
            AgreementError: a worker refuses this trainer (TransportError, if it is in another
                process).
        """
        if not isinstance(source, PlannedSource):
            raise ConfigError(
                f"{init_info.backend} sends in the order of a plan: give it a PlannedSource, not "
                f"{type(source).__name__} (vLLM's own {init_info.backend[5:]} takes any)"
            )
        agreeing = AgreeingClient(client, source, init_info.expected)
        if init_info.is_sender:
            agreeing.init_weight_transfer_engine({})
        engine: Self = super().trainer_init(init_info, client=agreeing, source=source)  # type: ignore[misc]
        engine._check_finite = init_info.check_finite
        return engine

    def send_weights(self) -> None:
        """Send as vLLM's engine does, after the workers have agreed. Called on every trainer rank.

        Raises:
            CoverageError: the source has NaN or infinite values; nothing was sent.
        """
        source = self.source.source
        self.client.finite_check = source.finite_check(self._check_finite)
        if self.client.finite_check == "source":
            source.check_finite()
        super().send_weights()  # type: ignore[misc]


class QerlNCCLTrainerWeightTransferEngine(_Agreeing, NCCLTrainerWeightTransferEngine):
    """vLLM's NCCL trainer engine for workers with the backend `qerl_nccl`."""

    init_info_cls = QerlNCCLTrainerInitInfo


class QerlIPCTrainerWeightTransferEngine(_Agreeing, IPCTrainerWeightTransferEngine):
    """vLLM's CUDA IPC trainer engine for workers with the backend `qerl_ipc`."""

    init_info_cls = QerlIPCTrainerInitInfo
