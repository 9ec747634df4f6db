"""A sync that does not bring what the trainer changed is noticed, and one that does is not."""

from __future__ import annotations

import logging

import pytest
import torch
from support.streams_by_hand import QKV, HandMadeTransport, ListSource, interleave

from qerl_sync import SyncConfig, SyncSession
from qerl_sync.errors import UnchangedError
from qerl_sync.verify.changes import PATIENCE, ChangeWatch, destination, sample_hash

NAMES = [meta.name for meta in interleave(QKV)]


def make(trained=None, **options):
    source = ListSource(interleave(QKV))
    config = SyncConfig.of(**options)
    return SyncSession(source, HandMadeTransport(), config, trained=trained), source


def step_of(tensors, *names):
    for name in names:
        tensors[name] += 1


def test_a_step_that_brings_nothing_is_warned_of(caplog):
    session, source = make()
    with caplog.at_level(logging.WARNING, logger="qerl_sync"):
        assert session.push(step=0).changed_tensors is None
        step_of(source.tensors, NAMES[0])
        assert session.push(step=1).changed_tensors == 1
        assert not caplog.records
        assert session.push(step=2).changed_tensors == 0
    (record,) = caplog.records
    assert "none of the 6 tensors sent has changed since the sync of step 1" in record.message
    assert "trainer is at step 2" in record.message


def test_an_error_names_what_changed_on_the_trainer_and_the_version_is_committed():
    adapters = {f"base_model.model.{n}.lora_A.default.weight": torch.zeros(8) for n in NAMES}
    session, _ = make(lambda: adapters.items(), on_unchanged="error")
    session.push(step=0)
    step_of(adapters, *list(adapters)[:5])
    words = r"(?s)version 2 was committed.*lora_A.*and 2 more changed on the trainer.*merged"
    with pytest.raises(UnchangedError, match=words):
        session.push(step=1)
    assert session.version == 2
    assert session.push(step=1).version == 3, "the same step again is no finding"


def test_a_model_that_stands_still_is_told_of_once(caplog):
    """A step that changes nothing is no finding: warm-up begins with a learning rate of zero."""
    tensors = {name: torch.zeros(8) for name in NAMES}
    session, source = make(lambda: tensors.items())
    with caplog.at_level(logging.WARNING, logger="qerl_sync"):
        for step in range(PATIENCE):
            session.push(step=step)
        step_of(tensors, NAMES[0])
        step_of(source.tensors, NAMES[0])
        for step in range(PATIENCE, 2 * PATIENCE):
            session.push(step=step)
        assert not caplog.records
        for step in range(2 * PATIENCE, 4 * PATIENCE):
            session.push(step=step)
    (record,) = caplog.records
    assert "the model is frozen" in record.message


def test_what_was_wrongly_left_out_is_named():
    """A source that takes a layer for frozen, which is trained."""
    source = ListSource(interleave(QKV))
    source.unchanging = lambda: {name: None for name in NAMES if name.startswith("b")}
    transport = HandMadeTransport()
    session = SyncSession(source, transport, SyncConfig(), trained=source.tensors.items)
    assert session.push(step=0).unsent_tensors == 0
    assert session.push(step=0).unsent_tensors == 0, "nobody says what the workers hold"
    transport.holding = True
    for step in range(1, PATIENCE + 1):
        step_of(source.tensors, "a.q", "b.q")
        report = session.push(step=step)
        assert (report.num_tensors, report.unsent_tensors) == (3, 3)
        assert report.changed_tensors == 1
    assert report.undelivered == ("b.q",)
    transport.fail_at = 1
    with pytest.raises(ConnectionError):
        session.push(step=PATIENCE + 1)
    transport.fail_at, transport.holding = None, False  # what it had begun to change
    assert session.push(step=PATIENCE + 1).unsent_tensors == 0, "after a failure all travels"


def test_ignored_where_it_is_meant(caplog):
    session, _ = make(on_unchanged="ignore")
    with caplog.at_level(logging.WARNING, logger="qerl_sync"):
        for step in range(3):
            assert session.push(step=step).changed_tensors is None
    assert not caplog.records


def test_a_step_that_changed_nothing_on_the_trainer_is_no_finding():
    """A learning rate of zero, at the start of a warm-up."""
    session, source = make(lambda: source.tensors.items(), on_unchanged="error")
    for step in range(3):
        report = session.push(step=step)
    assert report.changed_tensors == 0


def test_a_part_that_never_travels_is_found_and_frozen_ones_are_not():
    trained = {n: torch.zeros(4) for n in NAMES}
    session, source = make(lambda: trained.items(), on_unchanged="error")
    stuck, frozen = "a.q", "b.v"
    session.push(step=0)
    for step in range(1, PATIENCE + 1):
        step_of(trained, *(n for n in NAMES if n != frozen))
        step_of(source.tensors, *(n for n in NAMES if n not in (frozen, stuck)))
        if step < PATIENCE:
            assert session.push(step=step).undelivered == ()
    with pytest.raises(UnchangedError, match=rf"'{stuck}' changed on the trainer in each of"):
        session.push(step=PATIENCE)


def test_what_travels_now_and_then_is_no_finding():
    trained = {n: torch.zeros(4) for n in NAMES}
    session, source = make(lambda: trained.items(), on_unchanged="error")
    for step in range(10):
        step_of(trained, *NAMES)
        step_of(source.tensors, *(NAMES if step % PATIENCE == 0 else NAMES[1:]))
        session.push(step=step)


def test_a_failed_sync_is_not_what_the_next_is_compared_with():
    session, source = make(on_unchanged="error")
    session.push(step=0)
    step_of(source.tensors, *NAMES)
    session._transport.fail_at = 4
    with pytest.raises(ConnectionError):
        session.push(step=1)
    session._transport.fail_at = None
    assert session.push(step=1).changed_tensors == len(NAMES)


def test_rounding_hides_what_need_not_travel():
    """float32 on the trainer, bfloat16 on the way."""
    watch = ChangeWatch(lambda: [("w", master), ("x", master)])
    master = torch.ones(8)
    for step in range(PATIENCE + 2):
        master += 1e-6
        watch.begin()
        watch.see("w", master.bfloat16())
        watch.see("x", torch.full((4,), float(step)))
        assert watch.conclude(step).finding is None


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("base_model.model.model.l.0.q.lora_A.default.weight", "model.l.0.q.weight"),
        ("base_model.model.model.l.0.q.base_layer.bias", "model.l.0.q.bias"),
        ("base_model.model.m.lora_embedding_B.default", "m.weight"),
        ("base_model.model.lm_head.modules_to_save.default.bias", "lm_head.bias"),
        ("module._orig_mod.a._checkpoint_wrapped_module.b.weight", "a.b.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_names_without_wrappers_and_adapters(name, wanted):
    assert destination(name) == wanted


def test_merged_adapters_and_fused_experts_have_travelled():
    trained = {
        "base_model.model.l.q.lora_A.default.weight": torch.zeros(4),
        "l.experts.gate_up_proj": torch.zeros(4),
        "l.q.base_layer.weight": torch.zeros(4),
    }
    watch = ChangeWatch(lambda: trained.items())
    for step in range(PATIENCE + 2):
        step_of(trained, *list(trained)[:2])
        watch.begin()
        watch.see("l.q.weight", torch.full((4,), float(step)))
        watch.see("l.experts.0.gate_proj.weight", torch.full((4,), float(step)))
        watch.see("l.o.weight", torch.zeros(4))
        assert watch.conclude(step).finding is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (64, 64), (300, 257), (7, 33, 129)])
def test_fingerprints_see_bits_and_a_step_of_one_percent(shape, dtype):
    torch.manual_seed(0)
    one = torch.randn(shape).to(dtype)
    assert sample_hash(one) == sample_hash(one.clone())
    if one.numel() < 2:
        return
    other = one.clone()
    bits = other.view(-1).view(torch.uint8)
    step = 100 * dtype.itemsize if one.numel() > 4096 else bits.numel()
    bits[:: step - 1] ^= 1
    assert sample_hash(one) != sample_hash(other)


def test_a_view_has_the_fingerprint_of_its_own_values():
    one = torch.randn(301, 257)
    assert sample_hash(one.T) == sample_hash(one.T.contiguous())
    assert sample_hash(one[:, :100]) == sample_hash(one[:, :100].contiguous())
    assert sample_hash(one, torch.bfloat16) == sample_hash(one.to(torch.bfloat16))


def test_minus_zero_is_a_change():
    assert sample_hash(torch.tensor([0.0])) != sample_hash(torch.tensor([-0.0]))
