"""vLLM's own nccl and ipc engines under our plan: vLLM's code on both sides, without a GPU.

CUDA's streams, handles and communicator are replaced by host memory (support/native.py); what is
received goes into the model of a real engine, whose weights must come out exactly.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import torch
from support.engines import NEW, OLD, Subject
from support.features import needs
from support.native import Broadcast, backend, without_cuda
from test_failures import Wide
from test_vllm_contract import FourMethods

from qerl_sync import ConfigError, HFSource, PoisonedError, SyncError, TransportError
from qerl_sync.errors import AgreementError, CoverageError, EngineTakenError, LayerMapError
from qerl_sync.plan.sync_plan import build_plan
from qerl_sync.wire.handshake import call
from qerl_sync.wire.messages import PROTOCOL
from qerl_sync.wire.tokens import TOKEN_VARIABLE

pytestmark = [pytest.mark.vllm, needs("vLLM's own nccl and ipc engines")]

BUFFER_BYTES = 40 << 10

# The trainer's init info, by name: backend, its arguments.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "nccl packed": ("qerl_nccl", {"packed": True, "packed_buffer_size_bytes": BUFFER_BYTES}),
    "nccl": ("qerl_nccl", {"packed": False}),
    "ipc packed": ("qerl_ipc", {"packed": True, "packed_buffer_size_bytes": 160 << 10}),
    "ipc": ("qerl_ipc", {"packed": False}),
}
RENDEZVOUS = {"master_address": "127.0.0.1", "master_port": 1, "world_size": 2}


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Broadcast:
    return without_cuda(monkeypatch)


def plan_for(one: Subject, source: Any, policy: str = "reorder") -> Any:
    from qerl_sync import InProcessTransport

    metas = source.metadata()
    return build_plan(metas, InProcessTransport(one.engine).layer_map(metas), policy)


def init_info(way: str, rank: int = 0, **changes: Any) -> Any:
    from qerl_sync.integrations.vllm_native import QerlIPCTrainerInitInfo, QerlNCCLTrainerInitInfo

    name, arguments = WAYS[way]
    if name == "qerl_ipc":
        return QerlIPCTrainerInitInfo(rank=rank, **{**arguments, **changes})
    return QerlNCCLTrainerInitInfo(rank=rank, **RENDEZVOUS, **{**arguments, **changes})


def connect(one: Subject, way: str, source: Any, client: Any = None, **changes: Any) -> Any:
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    return WeightTransferTrainerFactory.trainer_init(
        init_info(way, **changes), client=client or FourMethods(one.engine), source=source
    )


def planned(one: Subject, version: int, policy: str = "reorder") -> Any:
    from qerl_sync.integrations.vllm import PlannedSource

    source = HFSource(one.trainers[version])
    return PlannedSource(source, plan_for(one, source, policy))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["dense", "bias", "moe", "tied"])
def test_weights_come_out_exactly(subject, group, kind, way):
    one = subject(kind)
    with backend(one.engine, WAYS[way][0]) as engine:
        for version in (NEW, OLD, NEW):
            trainer = connect(one, way, planned(one, version))
            trainer.send_weights()
            assert one.wrong_weights(version) == []
            report = engine.last_report
            assert report.trace == report.predicted, report.to_json()["first_difference"]
        trainer.shutdown()
    assert one.generates_as(NEW)
    assert report.trace.max_open_layers == 1
    assert report.version >= 3


@pytest.mark.parametrize("way", WAYS)
def test_a_bad_order_costs_what_was_predicted(subject, group, caplog, way):
    """Packed buffers end anywhere; what stays open pins them."""
    one = subject("dense")
    with backend(one.engine, WAYS[way][0]) as engine:
        source = planned(one, NEW, "warn")
        source.plan = build_plan(
            sorted(source.plan.metas, key=lambda meta: (len(meta.shape), meta.name)),
            engine._receiver.layer_map(source.source.metadata()),
            "warn",
        )
        with caplog.at_level(logging.WARNING, logger="qerl_sync"):
            for _ in range(2):
                connect(one, way, source).send_weights()
        report = engine.last_report
    assert one.wrong_weights(NEW) == []
    assert report.trace == report.predicted, report.to_json()["first_difference"]
    assert report.trace.max_open_layers > 1
    assert len([r for r in caplog.records if "parent layers at once" in r.getMessage()]) == 1
    pins_more = report.trace.peak_pinned_bytes > report.trace.peak_buffered_bytes
    assert pins_more == (way == "nccl packed")


def test_vllm_cuts_where_it_was_told(subject, group):
    one = subject("dense")
    with backend(one.engine, "qerl_nccl") as engine:
        source = planned(one, NEW)
        connect(one, "nccl packed", source).send_weights()
        assert engine.last_report.num_loads == len(group.sizes) > 5
    assert sum(group.sizes) == source.plan.nbytes
    largest = max(meta.nbytes for meta in source.plan.metas)
    assert all(BUFFER_BYTES < size <= BUFFER_BYTES + largest for size in group.sizes[:-1])


@pytest.mark.parametrize("way", ["nccl packed", "nccl", "ipc"])
def test_vllms_own_trainer_engine_is_served_in_its_order(subject, group, way):
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    one = subject("dense")
    name, arguments = WAYS[way]
    if name == "qerl_ipc":
        init = ipc_engine.IPCTrainerInitInfo(rank=0, **arguments)
    else:
        init = nccl_engine.NCCLTrainerInitInfo(rank=0, **RENDEZVOUS, **arguments)
    source = ModuleSource(one.trainers[NEW])
    with backend(one.engine, name) as engine, torch.no_grad():
        WeightTransferTrainerFactory.trainer_init(
            init, client=FourMethods(one.engine), source=source
        ).send_weights()
        assert engine.last_report.trace == engine.last_report.predicted
    assert one.wrong_weights(NEW) == []


def test_packed_ipc_wants_a_plan(subject, group):
    from vllm.distributed.weight_transfer.ipc_engine import (
        IPCTrainerInitInfo,
        IPCTrainerWeightTransferEngine,
    )

    one = subject("dense")
    init = IPCTrainerInitInfo(rank=0, **WAYS["ipc packed"][1])
    with backend(one.engine, "qerl_ipc"):
        trainer = IPCTrainerWeightTransferEngine.trainer_init(
            init, client=FourMethods(one.engine), source=planned(one, NEW)
        )
        with pytest.raises(AgreementError, match="sent no plan; let it use the backend qerl_ipc"):
            trainer.send_weights()
    assert one.wrong_weights(OLD) == []
    assert one.generates_as(OLD)


@pytest.mark.parametrize("way", WAYS)
def test_what_the_worker_refuses_is_refused_before_a_byte_moves(subject, group, way):
    from dataclasses import replace

    one = subject("dense")
    with backend(one.engine, WAYS[way][0]):
        source = planned(one, NEW)
        first, *rest = source.plan.metas
        for plan, error in (
            (replace(source.plan, metas=(replace(first, name="no.such"), *rest)), LayerMapError),
            (replace(source.plan, metas=tuple(rest)), CoverageError),
        ):
            source.plan, source._require_current = plan, lambda: None
            with pytest.raises(error):
                connect(one, way, source).send_weights()
    assert group.sizes == []
    assert one.wrong_weights(OLD) == []
    assert one.generates_as(OLD)


def test_a_plan_that_was_changed_on_the_way(subject, group):
    class Changing(FourMethods):
        def update_weights(self, update_info):
            if "plan" in update_info:
                update_info["plan"]["metas"].reverse()
            super().update_weights(update_info)

    one = subject("dense")
    with backend(one.engine, "qerl_ipc"):
        trainer = connect(one, "ipc", planned(one, NEW), Changing(one.engine))
        with pytest.raises(SyncError, match="the plan was changed after it was made"):
            trainer.send_weights()
    assert one.wrong_weights(OLD) == []


class Told(FourMethods):
    """Keeps what it was told, and changes what the trainer says of itself."""

    def __init__(self, llm: Any, **changes: Any) -> None:
        super().__init__(llm)
        self.changes = changes
        self.reported: list[dict[str, Any]] = []

    def init_weight_transfer_engine(self, init_info):
        said = {**init_info["qerl_sync"], **self.changes}
        self.reported.append({**init_info, "qerl_sync": said})
        super().init_weight_transfer_engine(self.reported[-1])

    def update_weights(self, update_info):
        self.reported.append(update_info)
        super().update_weights(update_info)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"version": "0.0.9"},
            rf"worker 0 of engine .* runs qerl-sync .* \(protocol {PROTOCOL}\), the trainer 0\.0",
        ),
        ({"protocol": 2, "more": "than we know"}, r"the trainer .* \(protocol 2\); install the "),
        ({"protocol": "?"}, r"under 'qerl_sync' is not of qerl-sync's trainer \(protocol: "),
    ],
)
def test_another_version_is_refused_before_vllm_connects(subject, group, way, changes, words):
    one = subject("dense")
    client = Told(one.engine, **changes)
    with backend(one.engine, WAYS[way][0]), pytest.raises(AgreementError, match=words):
        connect(one, way, planned(one, NEW), client)
    assert client.calls == ["init"]
    assert list(client.reported[0]) == ["qerl_sync"], (
        "vLLM's trainer may be waiting for its workers"
    )


EXPECTED = {"dtype": "float32", "tensor_parallel_size": 1, "quantization": None}


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"dtype": "bfloat16"}, r"has dtype 'float32', the trainer expects 'bfloat16'; start"),
        (
            {"tensor_parallel_size": 2, "dtype": "float16"},
            r"has tensor_parallel_size 1, the trainer expects 2",
        ),
        ({"quantization": "fp8"}, r"has quantization None, the trainer expects 'fp8'"),
        ({"vllm": "0.1"}, r"has vllm '.*', the trainer expects '0\.1'"),
        ({"dtpye": "float32"}, r"expects dtpye 'float32', of which workers say nothing; .* dtype"),
    ],
)
def test_the_first_thing_that_is_not_as_expected_is_named(subject, group, expected, words):
    one = subject("dense")
    client = FourMethods(one.engine)
    with backend(one.engine, "qerl_nccl") as engine:
        connect(one, "nccl", planned(one, NEW), expected=EXPECTED).send_weights()
        assert engine.last_report is not None
        with pytest.raises(AgreementError, match=words):
            connect(one, "nccl", planned(one, NEW), client, expected={**expected})
    assert client.calls == ["init"]


class TestToken:
    @pytest.mark.parametrize("way", WAYS)
    def test_who_knows_it_is_served(self, subject, group, way, monkeypatch):
        one = subject("dense")
        monkeypatch.setenv(TOKEN_VARIABLE, "a secret of both")
        client = Told(one.engine)
        with backend(one.engine, WAYS[way][0]):
            trainer = connect(one, way, planned(one, NEW), client)
            trainer.send_weights()
            trainer.send_weights()
        assert one.wrong_weights(NEW) == []
        assert "a secret" not in str(client.reported)
        numbers = [reported["qerl_sync"].get("number") for reported in client.reported]
        assert numbers == [None, None, *range(1, len(numbers) - 1)]

    @pytest.mark.parametrize(
        ("worker", "trainer", "words"),
        [
            ("ours", "", "this worker has a QERL_SYNC_TOKEN and the call does not show it"),
            ("ours", "theirs", "and the call shows another one; set the same for both"),
            ("", "theirs", "the trainer has a QERL_SYNC_TOKEN and this worker none"),
        ],
    )
    def test_who_does_not_is_refused(self, subject, group, monkeypatch, worker, trainer, words):
        one = subject("dense")
        monkeypatch.setenv(TOKEN_VARIABLE, worker)
        with backend(one.engine, "qerl_ipc"):
            monkeypatch.setenv(TOKEN_VARIABLE, trainer)
            with pytest.raises(AgreementError, match=words):
                connect(one, "ipc", planned(one, NEW))

    def test_vllms_own_trainer_cannot_show_it(self, subject, group, monkeypatch):
        from vllm.distributed.weight_transfer.ipc_engine import (
            IPCTrainerInitInfo,
            IPCTrainerWeightTransferEngine,
        )

        one = subject("dense")
        monkeypatch.setenv(TOKEN_VARIABLE, "a secret")
        with backend(one.engine, "qerl_ipc"), pytest.raises(AgreementError, match="not show it"):
            IPCTrainerWeightTransferEngine.trainer_init(
                IPCTrainerInitInfo(rank=0), client=FourMethods(one.engine), source=planned(one, NEW)
            )

    def test_a_proof_is_for_these_words_and_this_update(self, subject, group, monkeypatch):
        one = subject("dense")
        monkeypatch.setenv(TOKEN_VARIABLE, "a secret")
        client = Told(one.engine)
        with backend(one.engine, "qerl_nccl") as engine:
            connect(one, "nccl", planned(one, NEW), client).send_weights()
            _, init, plan, _ = client.reported
            admission = engine._admission
            with pytest.raises(AgreementError, match="shows another one"):
                admission.introduced({**init, "master_address": "a stranger's"})
            with pytest.raises(AgreementError, match="update 1 was repeated"):
                admission.called(plan)
            with pytest.raises(AgreementError, match="shows another one"):
                admission.called({"qerl_sync": {**plan["qerl_sync"], "number": 7}})
            with pytest.raises(AgreementError, match="does not show it"):
                admission.called({"names": []})
            session = plan["qerl_sync"]["session"]
            admission.called({"qerl_sync": call(3, "a secret", session).model_dump()})

    def test_a_second_trainer_does_not_pass_for_the_first(self, subject, group, monkeypatch):
        one = subject("dense")
        monkeypatch.setenv(TOKEN_VARIABLE, "a secret")
        with backend(one.engine, "qerl_nccl"):
            first = connect(one, "nccl", planned(one, NEW))
            first.send_weights()
            connect(one, "nccl", planned(one, OLD)).send_weights()
            with pytest.raises(EngineTakenError) as refused:
                first.send_weights()
            assert refused.value.pid == os.getpid()
            assert one.wrong_weights(OLD) == []

    def test_a_strangers_update_ends_no_sync(self, subject, group, monkeypatch):
        """vLLM ends its update, and the trainer hears so; what the model holds is as it was."""

        class Disturbed(FourMethods):
            def update_weights(self, update_info):
                if "names" in update_info:
                    with pytest.raises(AgreementError, match="does not show it"):
                        self._llm.update_weights({"update_info": {"names": []}})
                    assert engine._loads.plan is not None
                super().update_weights(update_info)

        one = subject("dense")
        monkeypatch.setenv(TOKEN_VARIABLE, "a secret")
        with backend(one.engine, "qerl_ipc") as engine:
            trainer = connect(one, "ipc", planned(one, NEW), Disturbed(one.engine))
            with pytest.raises(TransportError, match="start_weight_update must be called"):
                trainer.send_weights()
            assert engine._receiver.poisoned is None
        assert one.wrong_weights(OLD) == []


@pytest.mark.parametrize("way", WAYS)
def test_a_failure_in_the_middle_poisons_and_the_next_sync_heals(subject, group, way, monkeypatch):
    one = subject("dense")
    with backend(one.engine, WAYS[way][0]) as engine:
        # NaN that the source does not look for, in a tensor that comes late.
        sick = planned(one, NEW)
        name = sick.plan.order[-3]
        parameter = dict(one.trainers[NEW].named_parameters())[name]
        sick.source.checks_finite = False
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] = float("nan")
        try:
            with pytest.raises(CoverageError, match=f"{name}.* has 1 NaN"):
                connect(one, way, sick).send_weights()
        finally:
            with torch.no_grad():
                parameter.copy_(before)
        assert "a sync failed" in engine._receiver.poisoned
        with pytest.raises(PoisonedError):
            engine._model(None, None)
        while not group._sent.empty():  # what a GPU's trainer would now hang with
            group._sent.get()
        connect(one, way, planned(one, NEW)).send_weights()
        assert engine._receiver.poisoned is None
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)


def test_errors_of_vllms_own_code_are_translated(subject, group):
    one = subject("dense")
    with backend(one.engine, "qerl_ipc") as engine:
        trainer = connect(one, "ipc", planned(one, NEW))
        trainer.gpu_uuid = "GPU-of-another-host"
        with pytest.raises(TransportError, match="IPCWeightTransferEngine failed: ValueError: IPC"):
            trainer.send_weights()
        assert engine._receiver.poisoned is None  # nothing was loaded
        assert one.wrong_weights(OLD) == []  # and no layer is left open
        assert one.generates_as(OLD)


def test_an_update_that_ends_too_early_is_not_committed(subject, group):
    class Impatient(FourMethods):
        def update_weights(self, update_info):
            if self.calls.count("update") < 3:
                super().update_weights(update_info)

    one = subject("dense")
    with backend(one.engine, "qerl_ipc") as engine:
        trainer = connect(one, "ipc packed", planned(one, NEW), Impatient(one.engine))
        with pytest.raises(CoverageError, match="tensors outstanding, the first is"):
            trainer.send_weights()
        assert engine._receiver.poisoned
        one.engine.finish_weight_update()  # vLLM's worker still has it open
        assert "outstanding" in engine._receiver.poisoned
        connect(one, "ipc packed", planned(one, NEW)).send_weights()
    assert one.wrong_weights(NEW) == []


def test_the_source_looks_for_nan_before_anything_is_told(subject, group):
    one = subject("dense")
    with backend(one.engine, "qerl_nccl"):
        client = FourMethods(one.engine)
        source = planned(one, NEW)
        trainer = connect(one, "nccl", source, client)

        def find() -> None:
            raise CoverageError("has 1 NaN")

        source.source.check_finite = find
        with pytest.raises(CoverageError, match="has 1 NaN"):
            trainer.send_weights()
        assert client.calls == ["init", "init"]


def test_workers_look_for_what_their_dtype_has_not(subject, group):
    """Also where the source has looked for NaN."""
    from qerl_sync.integrations.vllm import PlannedSource

    one = subject("dense")
    wide = Wide(HFSource(one.trainers[NEW]))
    with backend(one.engine, "qerl_ipc") as engine:
        source = PlannedSource(wide, plan_for(one, wide))
        with pytest.raises(CoverageError, match="has values up to 1e\\+39"):
            connect(one, "ipc", source).send_weights()
        assert engine._receiver.poisoned
        connect(one, "ipc", source, check_finite=False).send_weights()
    assert len(one.wrong_weights(NEW)) == 1


def test_other_trainer_ranks_only_gather(subject, group):
    one = subject("dense")
    source = planned(one, NEW)
    asked: list[str] = []
    materialize = source.source.materialize
    source.source.materialize = lambda names: asked.extend(names) or materialize(names)
    connect(one, "nccl packed", source, object(), rank=1).send_weights()
    assert asked == list(source.plan.order)
    assert group.sizes == []


def test_reports_over_collective_rpc(subject, group):
    from support.native import worker_of

    from qerl_sync.worker.protocol.native import WeightReports

    one = subject("dense")
    with backend(one.engine, "qerl_ipc"):
        ask = WeightReports.last_weight_report
        assert one.engine.collective_rpc(ask) == [None]
        source = planned(one, NEW)
        connect(one, "ipc", source).send_weights()
        (report,) = one.engine.collective_rpc(ask)
    assert report["plan_digest"] == source.plan.digest
    assert report["prediction_exact"] is True
    assert report["max_open_layers_measured"] == 1
    with backend(one.engine, "qerl"), pytest.raises(ConfigError, match="keeps no report"):
        ask(worker_of(one.engine))


def test_a_source_without_a_plan(subject, group):
    from vllm.distributed.weight_transfer.base import ModuleSource

    one = subject("dense")
    with pytest.raises(ConfigError, match=r"give it a PlannedSource.*own nccl takes any"):
        connect(one, "nccl", ModuleSource(one.trainers[NEW]))
