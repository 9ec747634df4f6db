"""sync.delta. Only parent layers of which a byte has changed travel, or only such elements."""

from __future__ import annotations

import copy

import pytest
import torch
from support.engines import NEW, OLD
from support.loaders import TensorSource
from support.remote import session as remote_session
from support.syncs import push, session

from qerl_sync import ConfigError, HFSource, PublishedSource, Publisher
from qerl_sync.errors import LoadError, PlanError

pytestmark = pytest.mark.vllm

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
QKV = {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}


def open_session(engine, carrier, source, **options):
    options.setdefault("delta", "layers")
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


@torch.no_grad()
def step(trainer, share=0.01):
    """Change the last bit of some elements of each parameter, everywhere in it, and its last."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainer.parameters():
        bits = parameter.data.view(torch.int32)
        chosen = torch.rand(bits.shape, generator=generator) < share
        chosen.view(-1)[-1] = True
        bits ^= chosen.int()


@pytest.mark.parametrize("kernels", ["plain", "stock"])
def test_changed_elements_alone_have_the_effect_of_a_full_sync(remote, kernels):
    engine = remote("in process", "dense", kernels)
    trainer = copy.deepcopy(engine.trainers[NEW])
    step(trainer)
    with open_session(
        engine, "tcp", HFSource(trainer), delta="elements", verify="checksum", chunk_bytes="64KiB"
    ) as sync:
        full = sync.push(step=1)
        assert full.delta["sent"] == "everything"
        assert full.wire_bytes >= full.sent_bytes
        assert engine.wrong_weights(NEW) != []

        step(trainer)  # back
        report = sync.push(step=2)
        assert engine.wrong_weights(NEW) == []
        assert engine.generates_as(NEW)
        assert report.delta == {"sent": "elements", "reason": ""}
        assert report.unsent_tensors == 0
        assert report.wire_bytes <= 0.05 * full.wire_bytes
        assert report.prediction_exact, report.first_difference
        nbytes = sum(p.nbytes for p in trainer.parameters())
        assert nbytes <= report.mirror_bytes <= 1.1 * nbytes
        assert report.workers[0]["mirror_bytes"] == report.mirror_bytes

        take(trainer, engine.trainers[OLD])  # nearly every element: whole tensors
        report = sync.push(step=3)
        assert report.delta["sent"] == "elements"
        assert report.wire_bytes > 0.9 * full.wire_bytes
        assert engine.wrong_weights(OLD) == []

        with torch.no_grad():
            trainer.get_parameter(Q_PROJ).view(-1)[-1] *= -0.0  # a sign that `==` does not see
        flip_a_bit(trainer.get_parameter(Q_PROJ))
        report = sync.push(step=4)
        assert set(sync.plan.order) == QKV
        assert report.wire_bytes < 1000
        assert any("layers.1.self_attn.qkv_proj" in one for one in engine.wrong_weights(OLD))
        take(trainer, engine.trainers[OLD])
        sync.push(step=5)
        assert engine.wrong_weights(OLD) == []
        assert engine.generates_as(OLD)


@pytest.mark.parametrize("carrier", ["in process", "shm"])
def test_elements_are_layers_where_nothing_crosses_a_network(remote, carrier):
    engine = remote("in process", "dense", "plain")
    trainer = copy.deepcopy(engine.trainers[NEW])
    with open_session(engine, carrier, HFSource(trainer), delta="elements") as sync:
        sync.push()
        flip_a_bit(trainer.get_parameter(Q_PROJ))
        sync.push()
        flip_a_bit(trainer.get_parameter(Q_PROJ))
        report = sync.push()
        assert set(sync.plan.order) == QKV
        assert report.delta["sent"] == "layers"
        assert report.delta["reason"]
        assert report.mirror_bytes == 0
        assert engine.wrong_weights(NEW) == []


def test_changes_are_sent_to_no_worker_that_lacks_what_they_change(remote):
    engine = remote("in process", "dense", "plain")
    trainer = copy.deepcopy(engine.trainers[NEW])
    source = Cut(trainer)
    with open_session(engine, "tcp", source, delta="elements", on_failure="rollback") as sync:
        sync.push()
        flip_a_bit(trainer.get_parameter(Q_PROJ))
        assert sync.push().delta["sent"] == "elements"

        source.broken = True
        flip_a_bit(trainer.get_parameter(Q_PROJ))
        with pytest.raises(ConnectionResetError):
            sync.push()
        source.broken = False
        report = sync.push()
        assert report.delta["sent"] == "everything"
        assert report.delta["reason"]
        assert engine.wrong_weights(NEW) == []
        assert sync.push().delta["sent"] == "elements"

        sync._transport.disconnect()  # as where the connection was lost: both mirrors are gone
        report = sync.push()
        assert report.delta["sent"] == "everything"
        assert report.delta["reason"]
        assert engine.wrong_weights(NEW) == []

        with open_session(engine, "in process", HFSource(engine.trainers[OLD])) as other:
            other.push()
        assert sync.push().delta["sent"] == "everything"
        assert engine.wrong_weights(NEW) == []


def test_a_worker_with_another_mirror_refuses_before_the_first_byte(remote):
    engine = remote("in process", "dense", "plain")
    trainer = copy.deepcopy(engine.trainers[NEW])
    with open_session(engine, "tcp", HFSource(trainer), delta="elements") as sync:
        sync.push()
        sync._transport._own_staging.mirror.id = "another"
        report = sync.push()
        assert report.delta["sent"] == "everything"
        assert sync.push().delta["sent"] == "elements"
        assert engine.wrong_weights(NEW) == []


def test_a_mirror_that_is_not_allowed_is_refused_before_the_first_byte(remote):
    engine = remote("in process", "dense", "plain")
    with (
        open_session(
            engine,
            "tcp",
            HFSource(engine.trainers[NEW]),
            delta="elements",
            mirror_budget_bytes="1KiB",
        ) as sync,
        pytest.raises(PlanError),
    ):
        sync.push()
    assert engine.wrong_weights(OLD) == []
    assert engine.generates_as(OLD)


def test_published_versions_reach_an_engine_as_if_its_trainer_were_here(subject, tmp_path):
    one = subject("dense", "stock")
    trainer = copy.deepcopy(one.trainers[NEW])
    step(trainer)
    publisher, source = Publisher(str(tmp_path)), PublishedSource(str(tmp_path))
    assert publisher.publish(HFSource(trainer), step=1).is_full
    assert source.refresh()
    with session(one, source, delta="layers", verify="checksum") as sync:
        sync.push(step=source.step)
        assert one.wrong_weights(NEW) != []

        step(trainer)  # back
        found = publisher.publish(HFSource(trainer), step=2)
        assert not found.is_full
        assert source.refresh()
        sync.push(step=source.step)
        assert one.wrong_weights(NEW) == []
        assert one.generates_as(NEW)

        flip_a_bit(trainer.get_parameter(Q_PROJ))
        assert publisher.publish(HFSource(trainer), step=3).nbytes < 1000
        source.refresh()
        sync.push(step=source.step)
        assert set(sync.plan.order) == QKV, "the publisher's checksums say what has changed"
        assert one.wrong_weights(NEW) != []
