"""Syncs of a part of the model: only parent layers that may have changed travel.

The trainer starts as the new version with a part of the old one. When that part has become new too,
the engine must be what one is that was freshly loaded from the new version."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase

import pytest
import torch
from support.engines import NEW, OLD, logprob_gap
from support.fingerprint import difference, fingerprint
from support.loaders import TensorSource
from support.remote import push as remote_push
from support.remote import session as remote_session
from support.syncs import push, session

from qerl_sync import HFSource, InProcessTransport, PEFTSource, SyncConfig, SyncSession
from qerl_sync.errors import CoverageError, LoadError, PoisonedError, StaleBaseError
from qerl_sync.options import SyncOptions
from qerl_sync.plan.sync_plan import build_plan
from qerl_sync.sources.hf import probe_of
from qerl_sync.worker.compat.engine import in_process_parts
from qerl_sync.worker.load.receiver import Receiver

pytestmark = pytest.mark.vllm

# In checkpoint names. Of the first, `k_proj` and `v_proj` must go with `q_proj`.
PART = ("*.layers.1.self_attn.q_proj.*", "*.layers.0.mlp.*", "*.layers.1.input_layernorm.*")
EMBEDDINGS = ("model.embed_tokens.*",)


class Part(HFSource):
    """Declares that nothing changes but what matches `part`. `fail_at`: see `materialize`."""

    def __init__(self, model, part=PART):
        super().__init__(model)
        self.part, self.fail_at = part, None

    def unchanging(self):
        names = [meta.name for meta in self.metadata()]
        return {n: None for n in names if not any(fnmatchcase(n, one) for one in self.part)}

    def materialize(self, names):
        for i, item in enumerate(super().materialize(names)):
            if i == self.fail_at:
                raise ConnectionResetError("peer gone")
            yield item


def begun(one, part=PART):
    """A trainer on the new version, with the old one's part."""
    trainer = copy.deepcopy(one.trainers[NEW])
    take(trainer, one.trainers[OLD], part)
    return trainer


@torch.no_grad()
def take(trainer, other, part=PART):
    """Give the trainer that part of another's weights. Names in memory are those in checkpoints,
    but for experts, which are fused within `mlp`."""
    mine = trainer.state_dict()
    chosen = {n: t for n, t in other.state_dict().items() if any(fnmatchcase(n, p) for p in part)}
    assert chosen
    for name, tensor in chosen.items():
        mine[name].copy_(tensor)


KINDS = [
    ("moe", "stock", PART, "reorder"),
    ("moe", "plain", PART, "reorder"),
    ("moe_corrected", "stock", ("*.layers.1.mlp.*", "*.layers.0.self_attn.*"), "reorder"),
    ("dense", "stock", PART, "spill"),
    ("dense", "fp8", PART, "reorder"),
    ("bias", "stock", ("*.layers.0.self_attn.v_proj.bias",), "reorder"),
    ("tied", "stock", EMBEDDINGS, "reorder"),
    ("tied", "plain", EMBEDDINGS, "reorder"),
    ("padded", "stock", ("lm_head.*",), "reorder"),
]


@pytest.mark.parametrize(("kind", "kernels", "part", "policy"), KINDS)
def test_equals_a_fresh_engine(subject, kind, kernels, part, policy):
    one = subject(kind, kernels)
    trainer = begun(one, part)
    with session(one, Part(trainer, part), verify="checksum", policy=policy) as sync:
        assert sync.push(step=1).unsent_tensors == 0
        stale = one.wrong_weights(NEW)
        assert stale
        take(trainer, one.trainers[NEW], part)
        report = sync.push(step=2)
        sent, everything = set(sync.plan.order), set(sync.layer_map.contributions)
        assert len(sent) + report.unsent_tensors == len(everything) > len(sent)
        assert report.prediction_exact, report.first_difference
        assert report.undelivered == ()
        assert one.wrong_weights(NEW) == []
        assert one.generates_as(NEW)
        take(trainer, one.trainers[OLD], part)
        assert sync.push(step=3).unsent_tensors == report.unsent_tensors
        assert one.wrong_weights(NEW) == stale


ADAPTED = {
    "moe": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "tied": {"target_modules": ["o_proj", "embed_tokens"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_that_train(subject, kind):
    """In steps, of which each syncs what the adapters touch: as a full sync of plain weights."""
    from peft import LoraConfig, get_peft_model

    one = subject(kind)
    model = get_peft_model(copy.deepcopy(one.trainers[NEW]), LoraConfig(r=2, **ADAPTED[kind]))
    source = PEFTSource(model)
    with session(one, source, verify="checksum") as sync:
        assert sync.push(step=0).unsent_tensors == 0
        before = fingerprint(one.model)
        for step in (1, 2):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.1 * torch.randn_like(parameter)
            report = sync.push(step=step)
            assert report.unsent_tensors > 0
            assert report.prediction_exact, report.first_difference
        found = fingerprint(one.model)
        assert difference(found, before)
        assert logprob_gap(one.engine, model) <= 1e-5
    names = [meta.name for meta in source.metadata()]
    plain = {name: tensor.clone() for name, tensor in source.materialize(names)}
    with session(one, TensorSource(plain)) as sync:
        push(one, OLD)
        sync.push()
    assert difference(fingerprint(one.model), found) == []


def test_parent_layers_travel_whole(subject):
    one = subject("bias")
    part = ("*.layers.0.self_attn.v_proj.bias",)
    with session(one, Part(begun(one, part), part)) as sync:
        sync.push()
        sync.push()
        projections = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
        assert set(sync.plan.order) == {f"{p}.{n}" for p in projections for n in ("weight", "bias")}


def test_the_wrong_part_is_found(subject):
    """What the engine must be is what this file's tests hold it against; and `verify: full`."""
    one = subject("dense")
    trainer = begun(one)
    wrong = Part(trainer, ("lm_head.*",))
    probed = SyncSession(
        wrong,
        InProcessTransport(one.engine),
        SyncConfig.of(verify="full"),
        probe=probe_of(trainer),
    )
    with probed as sync:
        sync.push()
        take(trainer, one.trainers[NEW])
        with pytest.raises(CoverageError):
            sync.push()
        assert one.wrong_weights(NEW)
        with pytest.raises(PoisonedError):
            one.generates_as(NEW)
        report = sync.push()
    assert report.unsent_tensors == 0, "after a failure everything travels"
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)


@pytest.mark.parametrize("on_failure", ["poison", "rollback"])
def test_a_part_that_fails(subject, on_failure):
    one = subject("dense")
    trainer = begun(one)
    source = Part(trainer)
    with session(one, source, on_failure=on_failure, policy="warn") as sync:
        sync.push()
        before = fingerprint(one.model)
        take(trainer, one.trainers[NEW])
        source.fail_at = 5
        with pytest.raises(LoadError):
            sync.push()
        if on_failure == "rollback":
            assert fingerprint(one.model) == before
            one.generates_as(NEW)
        else:
            with pytest.raises(PoisonedError):
                one.generates_as(NEW)
        source.fail_at = None
        assert sync.push().unsent_tensors == 0
        assert one.wrong_weights(NEW) == []
        assert sync.push().unsent_tensors > 0
        assert one.generates_as(NEW)


def test_whoever_writes_to_the_rest_meanwhile_has_everything_sent(subject):
    """Another session, and whatever else: an engine that has slept (level 2) has no weights."""
    one = subject("dense")
    trainer = copy.deepcopy(one.trainers[NEW])
    with session(one, Part(trainer)) as sync:
        sync.push()
        assert sync.push().unsent_tensors > 0
        push(one, OLD)
        assert sync.push().unsent_tensors == 0
        assert one.wrong_weights(NEW) == []
        one.model.model.norm.weight.data.zero_()
        assert sync.push().unsent_tensors == 0
        assert one.wrong_weights(NEW) == []


def test_what_may_have_changed_between_two_syncs_travels(subject):
    """A stamp that is another than that of the last sync, or a name that had none then."""
    one = subject("dense")
    trainer = copy.deepcopy(one.trainers[NEW])
    source = Part(trainer)
    with session(one, source) as sync:
        sync.push()
        source.part = (*PART, "lm_head.*")
        assert "lm_head.weight" in (sync.push(), sync.plan)[1].order
        source.part = PART
        assert "lm_head.weight" in (sync.push(), sync.plan)[1].order
        assert "lm_head.weight" not in (sync.push(), sync.plan)[1].order


def test_the_worker_refuses_half_a_layer_and_another_base(subject):
    one = subject("dense")
    receiver = Receiver(in_process_parts(one.engine))
    source = HFSource(one.trainers[NEW])
    metas = source.metadata()
    layer_map = receiver.layer_map(metas)
    before = fingerprint(one.model)

    def start(part, **options):
        receiver.start(build_plan(part, layer_map, "reorder"), layer_map, SyncOptions(**options))

    halves = [meta for meta in metas if "q_proj" not in meta.name]
    whole = [meta for meta in metas if "norm" in meta.name]
    with pytest.raises(CoverageError):
        start(whole)
    with pytest.raises(CoverageError) as refused:
        start(halves, base=receiver.version)
    assert refused.value.layer == "model.layers.0.self_attn.qkv_proj"
    with pytest.raises(StaleBaseError) as stale:
        start(whole, base=receiver.version + 1)
    assert (stale.value.base, stale.value.version) == (receiver.version + 1, receiver.version)
    assert receiver.poisoned is None
    assert fingerprint(one.model) == before


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_over_a_connection(remote, carrier):
    engine = remote("own process")
    trainer = copy.deepcopy(engine.trainers[NEW])
    take(trainer, engine.trainers[OLD])
    options = {"transport": carrier, "chunk_bytes": "16KiB", "verify": "checksum"}
    with remote_session(engine, Part(trainer), **options) as sync:
        sync.push()
        take(trainer, engine.trainers[NEW])
        assert engine.wrong_weights(NEW)
        report = sync.push()
        assert report.unsent_tensors > 0
        assert report.prediction_exact, report.first_difference
        assert engine.wrong_weights(NEW) == []
        assert engine.generates_as(NEW)
        # The connection is lost and another trainer comes: nothing tells this one but the worker.
        sync._transport.disconnect()
        remote_push(engine, OLD)
        assert sync.push().unsent_tensors == 0
        assert engine.wrong_weights(NEW) == []


def test_a_worker_that_refuses_gets_everything_in_the_same_push(remote):
    engine = remote("own process")
    source = Part(engine.trainers[NEW])
    with remote_session(engine, source, transport="shm") as sync:
        sync.push()
        engine.rpc("spoil", "model.norm.weight")
        report = sync.push()
    assert report.unsent_tensors == 0
    assert engine.wrong_weights(NEW) == []
