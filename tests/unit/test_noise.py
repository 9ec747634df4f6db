"""Noise on what rollout engines get: its schedule, its numbers, and what a session does with it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.streams_by_hand import QKV, HandMadeTransport, ListSource, interleave

from qerl_sync import SyncConfig, SyncSession, load_config, noise_of
from qerl_sync.config import NoiseConfig
from qerl_sync.errors import ConfigError, UnchangedError
from qerl_sync.plan.noise_schedule import PRESETS, NoiseSchedule
from qerl_sync.sources.hf import probe_of
from qerl_sync.sources.noise import draw
from qerl_sync.verify.stored import stored_by

NOISE = {"preset": "section-4.1", "intervals": 5, "steps": 10, "names": ["a.*"]}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("intervals", [2, 3, 10, 31])
def test_the_schedule_is_equation_8(preset, intervals):
    start, end = PRESETS[preset]
    schedule = NoiseSchedule(start, end, intervals)
    last = intervals - 1  # K
    assert schedule.sigma(0) == 0.0
    for k in range(1, intervals):
        expected = start if last == 1 else start * (end / start) ** ((k - 1) / (last - 1))
        assert schedule.sigma(k) == pytest.approx(expected, rel=1e-12, abs=0)
    assert schedule.sigma(1) == start
    assert last == 1 or schedule.sigma(last) == pytest.approx(end, rel=1e-12)


def test_intervals_are_even_and_a_run_that_goes_on_stays_in_the_last():
    schedule = NoiseSchedule(*PRESETS["scripts"], 10)
    stages = [schedule.stage(step, 600) for step in range(600)]
    assert stages == sorted(stages)
    assert [stages.count(k) for k in range(10)] == [60] * 10
    assert schedule.stage(700, 600) == 9


def test_a_million_draws_have_the_deviation_asked_for():
    for sigma in (1e-2, 1e-4):
        drawn = draw(3, 1, "norm", (1_000_000,), sigma).double()
        assert abs(drawn.mean()) < 0.01 * sigma
        assert drawn.std() == pytest.approx(sigma, rel=0.01)
        assert drawn.abs().max() > 4 * sigma, "tails are there"


def test_what_differs_draws_differently_and_the_same_draws_the_same():
    one = draw(3, 1, "a", (64,), 1.0)
    assert torch.equal(one, draw(3, 1, "a", (64,), 1.0))
    # Pinned: a run's noise is made again years later, on another machine.
    assert one[:2].tolist() == pytest.approx([-0.003986493684351444, -1.826476812362671], rel=1e-6)
    for other in (draw(4, 1, "a", (64,), 1.0), draw(3, 2, "a", (64,), 1.0)):
        assert not torch.equal(one, other)
    assert not torch.equal(one, draw(3, 1, "b", (64,), 1.0))


class Norms(HandMadeTransport):
    """Keeps what arrives; its layers are norms."""

    kinds = ("RMSNorm", "RMSNorm")

    def layer_map(self, metas, options=None):
        found = super().layer_map(metas)
        kinds = dict(zip("ab", self.kinds, strict=True))
        layers = {n: replace(layer, kind=kinds[n]) for n, layer in found.layers.items()}
        return replace(found, layers=layers)

    def start(self, plan, layer_map, options):
        super().start(plan, layer_map, options)
        self.arrived = {}

    def send(self, chunk, tensors):
        def kept():
            for name, tensor in tensors:
                self.arrived[name] = tensor
                yield name, tensor

        super().send(chunk, kept())


def make(noise=NOISE, transport=None, **options):
    transport = transport or Norms()
    source = ListSource(interleave(QKV))
    for i, tensor in enumerate(source.tensors.values()):
        tensor.copy_(torch.arange(4) + i)
    config = SyncConfig.of(noise=noise, **options)
    return SyncSession(source, transport, config), transport, source


def test_off_sends_the_trainers_own_tensors():
    session, transport, source = make(noise=None)
    assert session.push(step=9).noise is None
    assert all(transport.arrived[name] is tensor for name, tensor in source.tensors.items())


def test_each_sync_starts_from_the_clean_norms_which_stay_as_they_are():
    session, transport, source = make()
    before = {name: tensor.clone() for name, tensor in source.tensors.items()}
    sigmas, seen = [], []
    for step in (0, 2, 4, 9, 9):
        report = session.push(step=step)
        noise = noise_of(report)
        assert noise_of(json.loads(json.dumps(report.to_json()))).keys() == noise.keys()
        for name, tensor in transport.arrived.items():
            expected = before[name] + noise[name] if name in noise else before[name]
            assert torch.equal(tensor, expected)
        assert set(noise) == (set() if step == 0 else {"a.q", "a.k", "a.v"})
        sigmas.append(report.noise["sigma"])
        seen.append(transport.arrived["a.q"])
        assert report.prediction_exact, report.first_difference
    assert all(torch.equal(source.tensors[name], tensor) for name, tensor in before.items())
    assert sigmas[:2] == [0.0, 5e-2]
    assert sigmas[3] == sigmas[4] == pytest.approx(5e-4)
    assert not torch.equal(seen[3], seen[4]), "each sync draws anew"
    assert report.noise["stage"] == 4
    assert report.noise["arrived_sigma"] == pytest.approx(5e-4, rel=1)


def test_a_run_that_is_resumed_goes_on_in_the_schedule_with_the_same_noise():
    session, transport, _ = make()
    for step in range(6):
        session.push(step=step)
    first = transport.arrived["a.q"]
    resumed, transport, _ = make()
    resumed.version = 5
    assert resumed.push(step=5).noise["stage"] == 2
    assert torch.equal(transport.arrived["a.q"], first)


def test_a_sync_of_the_clean_policy_has_no_noise():
    session, transport, source = make()
    session.push(step=9)
    assert not torch.equal(transport.arrived["a.q"], source.tensors["a.q"])
    assert session.push(step=9, clean=True).noise["sigma"] == 0
    assert torch.equal(transport.arrived["a.q"], source.tensors["a.q"])


def test_noise_is_no_progress():
    session, _, _ = make(on_unchanged="error")
    session.push(step=8)
    with pytest.raises(UnchangedError):
        session.push(step=9)


def test_steps_and_seed_of_the_run_count_where_the_section_has_none():
    session, transport, _ = make({k: v for k, v in NOISE.items() if k != "steps"})
    with pytest.raises(ConfigError):
        session.push(step=1)
    assert not transport.started
    with pytest.raises(ConfigError) as caught:
        session.begin_run(4)
    assert (caught.value.intervals, caught.value.steps) == (5, 4)
    session.begin_run(10, seed=7)
    assert session.push(step=2).noise["seed"] == 7


@pytest.mark.parametrize(
    ("names", "kinds", "pattern"),
    [
        (["a.*", "c.*"], Norms.kinds, "c.*"),
        (["*"], ("RMSNorm", "LayerNorm"), "*"),
        (["a.*"], ("LayerNorm", "LayerNorm"), "a.*"),
        (None, Norms.kinds, ", ".join(NoiseConfig.model_fields["names"].default)),
    ],
)
def test_what_is_no_rmsnorm_is_refused_before_the_first_byte(names, kinds, pattern):
    transport = Norms()
    transport.kinds = kinds
    noise = {k: v for k, v in {**NOISE, "names": names}.items() if v is not None}
    session, _, _ = make(noise, transport)
    with pytest.raises(ConfigError) as caught:
        session.push(step=0)
    assert caught.value.pattern == pattern
    assert not transport.started


@pytest.mark.parametrize(
    "noise",
    [
        {},
        {"sigma_start": 0.1},
        {"preset": "scripts", "sigma_start": 0.1},
        {"sigma_start": 0.1, "sigma_end": 0.2},
        {"preset": "scripts", "intervals": 10, "steps": 9},
        {"preset": "scripts", "intervals": 1},
        {"preset": "scripts", "names": []},
    ],
)
def test_a_schedule_that_cannot_be_is_refused(noise):
    with pytest.raises(ConfigError) as caught:
        SyncConfig.of(noise=noise)
    assert all(place.startswith("noise") for place, _ in caught.value.violations)


def test_more_intervals_than_the_trainer_has_steps(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: x}\ndata: {task: addition}\nreward: exact_match\n")
    given = ["output_dir=x", "sync.noise={preset: scripts}", "trainer.max_steps=9"]
    with pytest.raises(ConfigError) as caught:
        load_config(path, given, check_foreign=False)
    assert [place for place, _ in caught.value.violations] == ["sync.noise.intervals"]


def test_a_probe_answers_with_noise_and_leaves_the_model_alone():
    from support.models import make_model

    model = make_model("dense", 0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    probe = probe_of(model)
    tokens = probe.token_ids
    name = "model.layers.0.input_layernorm.weight"
    noise = {name: draw(0, 1, name, before[name].shape, 0.5)}
    noisy = probe.noisy(tokens, noise)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert noisy != probe.logprobs(tokens)
    with torch.no_grad():
        dict(model.named_parameters())[name].add_(noise[name])
    assert probe.logprobs(tokens) == noisy
    with pytest.raises(ConfigError) as caught:
        probe.noisy(tokens, {"model.nothing": torch.zeros(1)})
    assert caught.value.parameter == "model.nothing"


def test_verify_full_needs_a_probe_of_the_noisy_policy():
    probe = SimpleNamespace(token_ids=(1, 2), logprobs=lambda tokens: [0.0], noisy=None)
    config = SyncConfig.of(noise=NOISE, verify="full")
    with pytest.raises(ConfigError):
        SyncSession(ListSource(interleave(QKV)), Norms(), config, probe=probe)


def test_modules_compute_with_what_the_engine_stores_and_get_their_own_back():
    from support.models import make_model

    model = make_model("dense", 0)
    before = dict(model.named_parameters())
    values = {name: p.clone() for name, p in before.items()}
    probe = probe_of(model)
    said = {
        "scheme": "fp8_per_channel",
        "high_precision": {"lm_head": "", "model.layers.*.mlp": ""},
    }
    stored = stored_by(said, "bfloat16")
    assert stored is not None
    answer = probe.noisy(probe.token_ids, {}, stored)
    after = dict(model.named_parameters())
    assert all(after[name] is p and torch.equal(p, values[name]) for name, p in before.items())
    assert answer != probe.logprobs(probe.token_ids)
    with torch.no_grad():
        for path, module in model.named_modules():
            if module._parameters.get("weight") is not None:
                module.weight.copy_(stored(path, module, module.weight))
    assert probe.logprobs(probe.token_ids) == answer
    head = model.lm_head.weight
    assert torch.equal(head, values["lm_head.weight"].bfloat16().float())
    q = model.model.layers[0].self_attn.q_proj.weight
    gap = (q - values["model.layers.0.self_attn.q_proj.weight"]).abs()
    assert gap.max() > 0
    assert (gap <= 0.07 * q.abs() + q.abs().amax(1, keepdim=True) / 448 / 16).all(), "4 bits of 3"

    def fails(*_):
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        probe.noisy(probe.token_ids, {}, fails)
    assert all(after[n] is p for n, p in model.named_parameters())
    assert stored_by({"scheme": "mxfp8"}, "bfloat16") is None
