"""With `sync.noise` an engine is what a fresh one is that has loaded the noisy checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from support.engines import ENGINE_ARGUMENTS, NEW, generate, logprob_gap, model_of
from support.fingerprint import difference, fingerprint
from support.models import save_model
from support.syncs import push, session

from qerl_sync import HFSource, InProcessTransport, SyncConfig, SyncSession, noise_of
from qerl_sync.sources.hf import probe_of

pytestmark = pytest.mark.vllm

NOISE = {"sigma_start": 0.2, "sigma_end": 0.02, "intervals": 4, "steps": 8, "seed": 5}


@torch.no_grad()
def noisy_copy(trainer, report):
    """The trainer's model with what the report says was added."""
    model = copy.deepcopy(trainer)
    for name, noise in noise_of(report).items():
        dict(model.named_parameters())[name].add_(noise)
    return model


def test_equals_a_fresh_engine_that_quantises_the_noisy_checkpoint(subject, engine_pool, tmp_path):
    one = subject("dense", "fp8")
    trainer = one.trainers[NEW]
    before = fingerprint(trainer)
    sync = session(one, HFSource(trainer), noise=NOISE, verify="checksum")
    assert sync.push(step=0).noise["sigma"] == 0
    assert one.wrong_weights(NEW) == [], "the first interval has no noise"

    report = sync.push(step=2)

    assert len(noise_of(report)) == 4
    path = save_model(noisy_copy(trainer, report), tmp_path / "noisy")
    fresh = engine_pool.start(path, **ENGINE_ARGUMENTS["fp8"])
    assert len(one.wrong_weights(NEW)) == 4, "the norms, and nothing else"
    assert difference(fingerprint(one.model), fingerprint(model_of(fresh))) == []
    assert generate(one.engine) == generate(fresh)
    assert fingerprint(trainer) == before

    sync.push(step=2, clean=True)
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)


def test_the_trainer_with_the_same_noise_agrees_to_rounding(subject):
    one = subject("dense")
    trainer = one.trainers[NEW]
    report = push(one, NEW, noise={**NOISE, "steps": 4, "intervals": 2})
    assert report.noise["sigma"] == 0, "a session's first step is step 0"
    sync = session(one, HFSource(trainer), noise=NOISE)
    report = sync.push(step=7)
    assert logprob_gap(one.engine, trainer) > 1e-3
    assert logprob_gap(one.engine, noisy_copy(trainer, report)) <= 1e-5
    assert report.noise["arrived_sigma"] == pytest.approx(0.02, rel=0.2)


def full(subject, **options):
    """A session that asks the engine after each sync."""
    trainer = subject.trainers[NEW]
    config = SyncConfig.of(noise=NOISE, verify="full", **options)
    transport = InProcessTransport(subject.engine)
    return SyncSession(HFSource(trainer), transport, config, probe=probe_of(trainer))


def test_verify_full_asks_the_trainer_with_the_same_noise(subject):
    one = subject("dense")
    report = full(one).push(step=2)
    assert report.probe_gap <= 1e-5
    assert logprob_gap(one.engine, one.trainers[NEW]) > 1e-2
    assert report.mismatch["noise"] > 1e-2
    assert report.mismatch["total"] == pytest.approx(report.mismatch["noise"], abs=1e-5)
    assert report.mismatch["quantisation"] == report.mismatch["sync"] == 0
    assert report.mismatch["kernels"] <= 1e-5


def test_a_mismatch_is_told_apart_into_noise_quantisation_and_kernels(subject):
    sync = full(subject("dense", "fp8"), verify_tolerance=5.0)
    clean = sync.push(step=2, clean=True).mismatch
    assert clean["noise"] == 0
    assert 0 < clean["kernels"] < clean["total"]
    assert clean["quantisation"] > 0
    noisy = sync.push(step=2).mismatch
    assert noisy["noise"] > noisy["kernels"]
    assert noisy["total"] > clean["total"]
