"""sync.delta: layers. Only parent layers of which a byte has changed travel."""

from __future__ import annotations

import copy

import pytest
import torch
from support.engines import NEW, OLD
from support.loaders import TensorSource
from support.remote import session as remote_session
from support.syncs import push, session

from qerl_sync import ConfigError, HFSource
from qerl_sync.errors import LoadError

pytestmark = pytest.mark.vllm

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
QKV = {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}


def open_session(engine, carrier, source, **options):
    options["delta"] = "layers"
    if carrier == "in process":
        return session(engine.subject, source, **options)
    return remote_session(engine, source, transport=carrier, **options)


@torch.no_grad()
def flip_a_bit(parameter):
    """Past torch's count of writes, and not where samples are taken."""
    parameter.data.view(torch.int32).view(-1)[-130].bitwise_xor_(1)


@torch.no_grad()
def take(trainer, other, part=""):
    for name, tensor in trainer.state_dict().items():
        if part in name:
            tensor.copy_(other.state_dict()[name])


@pytest.mark.parametrize("kernels", ["plain", "stock"])
@pytest.mark.parametrize("carrier", ["in process", "shm", "tcp"])
def test_what_has_changed_travels_and_nothing_else(remote, carrier, kernels):
    engine = remote("in process", "dense", kernels)
    trainer = copy.deepcopy(engine.trainers[NEW])
    with open_session(engine, carrier, HFSource(trainer), verify="checksum") as sync:
        assert sync.push(step=1).unsent_tensors == 0
        assert engine.wrong_weights(NEW) == []

        flip_a_bit(trainer.get_parameter(Q_PROJ))
        report = sync.push(step=2)
        assert set(sync.plan.order) == QKV, "its parent layer travels whole"
        assert report.unsent_bytes > 0
        assert report.prediction_exact, report.first_difference
        assert any("layers.1.self_attn.qkv_proj" in one for one in engine.wrong_weights(NEW))

        flip_a_bit(trainer.get_parameter(Q_PROJ))
        sync.push(step=3)
        assert engine.wrong_weights(NEW) == []
        assert engine.generates_as(NEW)

        take(trainer, engine.trainers[OLD], "layers.0")
        report = sync.push(step=4)
        assert all("layers.0" in name for name in sync.plan.order)
        take(trainer, engine.trainers[OLD])
        report = sync.push(step=5)
        assert not any("layers.0" in name for name in sync.plan.order)
        assert engine.wrong_weights(OLD) == []
        assert engine.generates_as(OLD)


@pytest.mark.parametrize("carrier", ["in process", "shm"])
def test_a_sync_of_the_same_bytes_sends_the_least_and_counts_as_one(remote, carrier):
    engine = remote("in process", "dense", "plain")
    with open_session(engine, carrier, HFSource(engine.trainers[NEW])) as sync:
        full = sync.push()
        again = sync.push()
        assert again.version == full.version + 1
        assert again.sent_bytes <= full.sent_bytes / 20
        assert engine.wrong_weights(NEW) == []


def test_frozen_weights_are_hashed_once(subject, monkeypatch):
    from qerl_sync.verify import stamps

    one = subject("dense", "plain")
    trainer = copy.deepcopy(one.trainers[NEW])
    for name, parameter in trainer.named_parameters():
        parameter.requires_grad = name == Q_PROJ
    hashed = []
    real = stamps.fingerprint
    monkeypatch.setattr(stamps, "fingerprint", lambda t: hashed.append(t.shape) or real(t))
    with session(one, HFSource(trainer), delta="layers") as sync:
        sync.push()
        assert len(hashed) == len(sync.plan.order)
        hashed.clear()
        sync.push()
        assert len(hashed) == 1
        with torch.no_grad():
            trainer.model.norm.weight.add_(1)
        sync.push()
        assert set(sync.plan.order) == {"model.norm.weight"}


def test_whoever_missed_a_version_gets_everything(subject):
    one = subject("dense", "plain")
    trainer = copy.deepcopy(one.trainers[NEW])
    with session(one, HFSource(trainer), delta="layers") as sync:
        sync.push()
        push(one, OLD)  # another session
        assert sync.push().unsent_tensors == 0
        assert one.wrong_weights(NEW) == []
        one.model.model.norm.weight.data.zero_()  # something else
        assert sync.push().unsent_tensors == 0
        assert one.wrong_weights(NEW) == []


class Cut(HFSource):
    broken = False

    def materialize(self, names):
        for item in super().materialize(names):
            if self.broken:
                raise ConnectionResetError("peer gone")
            yield item


def test_after_a_failure_everything_travels(subject):
    one = subject("dense", "plain")
    trainer = copy.deepcopy(one.trainers[NEW])
    source = Cut(trainer)
    with session(one, source, delta="layers") as sync:
        sync.push()
        flip_a_bit(trainer.get_parameter(Q_PROJ))
        source.broken = True
        with pytest.raises(LoadError):
            sync.push()
        source.broken = False
        flip_a_bit(trainer.get_parameter(Q_PROJ))
        assert sync.push().unsent_tensors == 0
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)


def test_a_source_that_cannot_hash_is_refused(subject):
    one = subject("dense", "plain")
    with pytest.raises(ConfigError, match="TensorSource"):
        session(one, TensorSource({"a": torch.ones(1)}), delta="layers")
