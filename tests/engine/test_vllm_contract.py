"""vLLM's trainer contract: its factory, clients and sources drive workers with the backend qerl."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from support.engines import NEW, OLD
from support.features import needs
from support.native import backend
from support.ports import free_port

from qerl_sync import ConfigError, HFSource, SyncConfig, TransportError
from qerl_sync.errors import CoverageError, PlanError

pytestmark = [pytest.mark.vllm, needs("trainer's side of weight transfer")]

TIMEOUT_SECONDS = 30.0


class FourMethods:
    """The least that vLLM's protocol asks of a client."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self.calls: list[str] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.calls.append("init")
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.calls.append("start")
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.calls.append("update")
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.calls.append("finish")
        self._llm.finish_weight_update(weight_version)


def own_order(source: Any, held: Any = None, order: Any = None) -> Any:
    """A WeightSource that yields in one order only, with None for what this rank does not hold."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class OwnOrder(WeightSource):
        def __init__(self) -> None:
            self.metas = source.metadata()
            if order is not None:
                self.metas = order(self.metas)
            self.yielded: list[str] = []

        def metadata(self):
            return [ParamMeta(m.name, getattr(torch, m.dtype), m.shape) for m in self.metas]

        def held_names(self):
            return held

        def __iter__(self):
            for name, tensor in source.materialize([meta.name for meta in self.metas]):
                self.yielded.append(name)
                yield name, tensor if held is None or name in held else None

    return OwnOrder()


def trainer_engine(client: Any, source: Any, *, rank: int = 0, ranks: Any = None, **sync: Any):
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    from qerl_sync.integrations.vllm import QerlTrainerInitInfo

    init = QerlTrainerInitInfo(
        rank=rank,
        sync=SyncConfig.of(
            **{"chunk_bytes": "64KiB", "timeout_seconds": TIMEOUT_SECONDS, **sync},
        ),
        **(ranks or {}),
    )
    return WeightTransferTrainerFactory.trainer_init(init, client=client, source=source)


def module_source(model: Any) -> Any:
    from vllm.distributed.weight_transfer.base import ModuleSource

    return ModuleSource(model)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_vllms_factory_client_and_source(subject, kind):
    """The four methods are all that is asked of a client."""
    one = subject(kind)
    with backend(one.engine, "qerl"):
        client = FourMethods(one.engine)
        engine = trainer_engine(client, module_source(one.trainers[NEW]))
        try:
            engine.send_weights()
            assert one.wrong_weights(NEW) == []
            assert one.generates_as(NEW)
            report = engine.last_report
            assert report.prediction_exact, report.first_difference
            assert report.max_open_layers_measured == 1
            assert (report.step, report.num_chunks > 3) == (0, True)
            engine.send_weights()
            assert engine.last_report.version == report.version + 1
            assert engine.last_report.step == 1
        finally:
            engine.shutdown()
        # Connected once; the dry run and each sync are an update of their own.
        assert client.calls == ["init", *["start", "update", "finish"] * 3]


def test_our_client_is_one_of_vllms(subject):
    from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient

    from qerl_sync.engines.llm import LLMClient

    one = subject("dense")
    client = LLMClient(one.engine)
    assert isinstance(client, VLLMWeightSyncClient)
    with backend(one.engine, "qerl"):
        engine = trainer_engine(client, module_source(one.trainers[NEW]))
        engine.send_weights()
        engine.shutdown()
    assert one.wrong_weights(NEW) == []


@pytest.mark.parametrize("method", ["init_weight_transfer_engine", "start_weight_update"])
def test_a_clients_own_errors_become_ours(subject, method):
    one = subject("dense")

    class Failing(FourMethods):
        pass

    def fail(*arguments: Any) -> None:
        raise OSError("no route to host")

    setattr(Failing, method, fail)

    def send() -> None:
        source = module_source(one.trainers[NEW])
        trainer_engine(Failing(one.engine), source, timeout_seconds=3).send_weights()

    message = f"{method}: .*no route to host"
    with backend(one.engine, "qerl"), pytest.raises(TransportError, match=message) as error:
        send()
    assert isinstance(error.value.__cause__, OSError)
    assert one.wrong_weights(OLD) == []


def by_name(metas: Any) -> Any:
    return sorted(metas, key=lambda meta: meta.name)


def test_a_source_with_one_order_keeps_it_or_is_refused(subject):
    one = subject("dense")
    with backend(one.engine, "qerl"):
        source = own_order(HFSource(one.trainers[NEW]), order=by_name)
        refused = trainer_engine(FourMethods(one.engine), source)
        with pytest.raises(PlanError, match=r"in its own order only.*policy: spill.*warn"):
            refused.send_weights()
        refused.shutdown()
        assert one.wrong_weights(OLD) == []
        assert one.generates_as(OLD)

        warned = trainer_engine(FourMethods(one.engine), source, policy="warn")
        for _ in range(2):
            source.yielded.clear()
            warned.send_weights()
            assert source.yielded == [meta.name for meta in source.metas]
        assert warned.last_report.max_open_layers_measured > 1
        warned.shutdown()
        assert one.wrong_weights(NEW) == []


def test_a_source_with_one_order_is_put_in_order_on_the_worker(subject):
    one = subject("dense")
    source = own_order(HFSource(one.trainers[NEW]), order=by_name)
    with backend(one.engine, "qerl"):
        engine = trainer_engine(FourMethods(one.engine), source, policy="spill")
        engine.send_weights()
        engine.shutdown()
    assert one.wrong_weights(NEW) == []
    assert engine.last_report.max_open_layers_measured == 1
    assert source.yielded == [meta.name for meta in source.metas]


def test_an_order_that_is_good_already_is_streamed(subject):
    one = subject("dense")
    source = own_order(HFSource(one.trainers[NEW]))
    with backend(one.engine, "qerl"):
        engine = trainer_engine(FourMethods(one.engine), source, ignore_names=["nothing"])
        engine.send_weights()
        engine.shutdown()
    assert one.wrong_weights(NEW) == []
    assert engine.last_report.max_open_layers_measured == 1


def test_a_source_with_tensor_by_name_is_reordered(subject):
    one = subject("dense")
    source = own_order(HFSource(one.trainers[NEW]), order=by_name)
    parameters = dict(one.trainers[NEW].named_parameters())
    source.tensor = parameters.__getitem__
    with backend(one.engine, "qerl"):
        engine = trainer_engine(FourMethods(one.engine), source)
        engine.send_weights()
        engine.shutdown()
    assert one.wrong_weights(NEW) == []
    assert engine.last_report.max_open_layers_measured == 1
    assert source.yielded == []


def test_a_source_that_says_one_thing_and_does_another(subject):
    one = subject("dense")
    source = own_order(HFSource(one.trainers[NEW]))
    source.held_names = lambda: {meta.name for meta in source.metas}
    stream = list(source)
    first = stream[0][0]
    cases = {
        "has ended and": lambda: iter(stream[:-1]),
        f"None for {first!r}": lambda: iter([(first, None), *stream[1:]]),
    }
    with backend(one.engine, "qerl"):
        for message, iterate in cases.items():
            type(source).__iter__ = lambda self, iterate=iterate: iterate()
            engine = trainer_engine(FourMethods(one.engine), source)
            with pytest.raises(CoverageError, match=message):
                engine.send_weights()
            engine.shutdown()


# ---- several trainer ranks


def run_ranks(one: Any, sources: list[Any], monkeypatch: Any, **sync: Any) -> list[Any]:
    """`send_weights` on as many trainer ranks, rank 1 in a thread; their engines or errors."""
    monkeypatch.setenv("QERL_SYNC_TOKEN", "the ranks' own")
    ranks = {
        "endpoints": [f"127.0.0.1:{free_port()}" for _ in sources],
        "num_workers": 1,
    }
    outcomes: list[Any] = [None] * len(sources)

    def run(rank: int) -> None:
        client = FourMethods(one.engine) if rank == 0 else None
        engine = trainer_engine(client, sources[rank], rank=rank, ranks=ranks, **sync)
        try:
            engine.send_weights()
            outcomes[rank] = engine.last_report
        except Exception as exc:
            outcomes[rank] = exc
        finally:
            engine.shutdown()

    with backend(one.engine, "qerl"):
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(sources))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * TIMEOUT_SECONDS)
        assert not any(thread.is_alive() for thread in threads)
    return outcomes


def all_sent(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def halves(source: Any) -> list[set[str]]:
    names = [meta.name for meta in source.metadata()]
    return [set(names[::2]), set(names[1::2])]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_two_ranks_with_half_of_the_tensors_each(subject, monkeypatch, kind):
    one = subject(kind)
    hf = HFSource(one.trainers[NEW])
    sources = [own_order(hf, held) for held in halves(hf)]
    reports = all_sent(run_ranks(one, sources, monkeypatch))
    assert one.wrong_weights(NEW) == []
    assert all(report.prediction_exact for report in reports)
    assert reports[0].plan_digest == reports[1].plan_digest
    # Gathers are collectives: each rank iterates to the end, whatever it sends.
    assert sources[0].yielded == sources[1].yielded == [m.name for m in hf.metadata()]


def test_two_ranks_that_hold_everything(subject, monkeypatch):
    one = subject("dense")
    wrong = HFSource(one.trainers[OLD])  # what rank 1 would send, if it sent anything
    sources = [own_order(HFSource(one.trainers[NEW])), own_order(wrong)]
    all_sent(run_ranks(one, sources, monkeypatch))
    assert one.wrong_weights(NEW) == []
    assert sources[1].yielded == [meta.name for meta in wrong.metadata()]


def test_a_tensor_that_no_rank_holds(subject, monkeypatch):
    one = subject("dense")
    hf = HFSource(one.trainers[NEW])
    first, second = halves(hf)
    orphan = hf.metadata()[3].name
    sources = [own_order(hf, first), own_order(hf, second - {orphan})]
    for outcome in run_ranks(one, sources, monkeypatch):
        assert isinstance(outcome, CoverageError)
        assert f"no trainer rank holds {orphan!r}" in str(outcome)
    assert one.wrong_weights(OLD) == []
    assert one.generates_as(OLD)


def test_workers_that_do_not_connect_leave_no_listener_behind():
    import psutil
    from vllm.distributed.weight_transfer.base import ModuleSource

    from qerl_sync.integrations.vllm import QerlTrainerInitInfo, QerlTrainerWeightTransferEngine

    class Refuses:
        def init_weight_transfer_engine(self, init_info: Any) -> None:
            raise RuntimeError("told to")

        start_weight_update = update_weights = finish_weight_update = init_weight_transfer_engine

    def listening() -> list[Any]:
        return [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]

    before, source = listening(), ModuleSource(torch.nn.Linear(2, 2))
    with pytest.raises(TransportError, match="told to"):
        QerlTrainerWeightTransferEngine.trainer_init(
            QerlTrainerInitInfo(rank=0), client=Refuses(), source=source
        )
    assert listening() == before


def test_ranks_that_cannot_work(monkeypatch):
    monkeypatch.setenv("QERL_SYNC_TOKEN", "t")
    source = own_order(HFSource(torch.nn.Linear(2, 2), convert=False))
    with pytest.raises(ConfigError, match="rank 1 needs `endpoints`"):
        trainer_engine(None, source, rank=1)
    with pytest.raises(ConfigError, match="rank 2 has no endpoint"):
        trainer_engine(None, source, rank=2, ranks={"endpoints": ["a:1", "b:2"], "num_workers": 1})
    with pytest.raises(ConfigError, match="give it as source="):
        trainer_engine(None, None)
    own = "InProcessTransport|in the trainer.s own process"
    with pytest.raises(ConfigError, match=own):
        trainer_engine(None, source, transport="inproc")


# ---- our order for vLLM's own engines


def planned(hf: Any, policy: str = "reorder") -> Any:
    from qerl_sync.integrations.vllm import PlannedSource
    from qerl_sync.plan.layer_map import Contribution, LayerMap, ParentLayer
    from qerl_sync.plan.sync_plan import build_plan

    def parent(name: str) -> str:
        return name.rpartition(".")[0].replace("q_proj", "qkv").replace("v_proj", "qkv")

    metas = hf.metadata()
    layers = {parent(m.name): 0 for m in metas}
    for m in metas:
        layers[parent(m.name)] += m.numel
    layer_map = LayerMap(
        {name: ParentLayer(name, "Linear", n, n) for name, n in layers.items()},
        {m.name: (Contribution(parent(m.name), "w", m.numel, m.nbytes, True),) for m in metas},
    )
    return PlannedSource(hf, build_plan(metas, layer_map, policy, chunk_bytes=64 << 10))


def test_a_planned_source_is_in_plan_order():
    from support.models import make_model

    model = make_model("dense", NEW)
    hf = HFSource(model)
    source = planned(hf)
    names = [meta.name for meta in hf.metadata()]
    order = [meta.name for meta in source.metadata()]
    assert sorted(order) == sorted(names)
    assert order != names
    parameters = dict(model.named_parameters())
    stream = list(source)
    assert [name for name, _ in stream] == order
    assert all(tensor.equal(parameters[name]) for name, tensor in stream)
    assert all(
        (meta.dtype, meta.shape) == (t.dtype, tuple(t.shape))
        for meta, (_, t) in zip(source.metadata(), stream, strict=True)
    )
    grouped = list(source.iter_groups())
    assert [names for names, _ in grouped] == source.groups()
    assert [name for group in source.groups() for name in group] == order
    assert all(len(group) > 1 for group in source.groups()[1:-1])
    assert all(t.equal(parameters[n]) for ns, ts in grouped for n, t in zip(ns, ts, strict=True))


def test_a_planned_source_that_holds_a_part():
    from support.models import make_model

    hf = HFSource(make_model("dense", NEW))
    held = halves(hf)[0]
    hf.held_names = lambda: held
    stream = dict(planned(hf))
    assert {name for name, tensor in stream.items() if tensor is not None} == held
    assert stream.keys() == {meta.name for meta in hf.metadata()}


def test_a_plan_for_another_source():
    from support.models import make_model

    from qerl_sync.integrations.vllm import PlannedSource, VLLMSource

    plan = planned(HFSource(make_model("dense", NEW))).plan
    with pytest.raises(PlanError, match=r"the plan sends .* the source has"):
        PlannedSource(HFSource(make_model("moe", NEW)), plan)
    one_way = VLLMSource(own_order(HFSource(make_model("dense", NEW))))
    with pytest.raises(PlanError, match="another order than the source"):
        PlannedSource(one_way, plan)
    with pytest.raises(PlanError, match="needs workers with the backend qerl"):
        planned(HFSource(make_model("dense", NEW)), "spill")


# ---- the plugin


def test_the_plugin_registers_once_and_costs_nothing():
    """In a process of its own: which engines vLLM then knows, and what was imported for it."""
    code = (
        "import sys; import vllm.distributed.weight_transfer.factory as f;"
        "import sys; import vllm.distributed.weight_transfer.factory as f;"
        "before = set(sys.modules);"
        "from qerl_sync.worker.protocol.plugin import register; register(); register();"
        "print(sorted(n for n in f.WeightTransferEngineFactory._registry if 'qerl' in n));"
        "print(sorted(n for n in f.WeightTransferTrainerFactory._registry if 'qerl' in n));"
        "print(sorted(set(sys.modules) - before))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout.splitlines()
    assert out[-3:-1] == ["['qerl', 'qerl_ipc', 'qerl_nccl']"] * 2
    packages = ["qerl_sync", "qerl_sync.worker", "qerl_sync.worker.protocol"]
    assert out[-1] == str([*packages, "qerl_sync.worker.protocol.plugin"])


def test_what_the_plugin_names_is_there():
    from importlib import import_module

    from qerl_sync.worker.protocol import plugin

    for engines in (plugin.WORKER_ENGINES, plugin.TRAINER_ENGINES):
        for module, name in engines.values():
            assert isinstance(getattr(import_module(module), name), type)
