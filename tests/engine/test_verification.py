"""What a sync brought is what the kernels hold, and nothing of before survives in caches."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
from support.engines import NEW, OLD, generate
from support.features import require_packed
from support.remote import session as remote_session
from support.syncs import push, session
from support.tensors import TwoTensors

from qerl_sync import (
    ConfigError,
    HFSource,
    InProcessTransport,
    PoisonedError,
    SyncConfig,
    SyncSession,
)
from qerl_sync.build import remote_transport
from qerl_sync.errors import CoverageError
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.sources.hf import probe_of
from qerl_sync.transports.remote import staging
from qerl_sync.verify.checksum import PAGE_BYTES, checksum, page_sums
from qerl_sync.verify.probe_prompt import shortened
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.load import refresh
from qerl_sync.worker.load.kernel_check import KernelCheck, kernel_checksums, kernel_digests
from qerl_sync.worker.load.receiver import Receiver

pytestmark = pytest.mark.vllm

HEAD = "lm_head"
NORM = "model.layers.0.input_layernorm.weight"


# ---------------------------------------------------------------------------------- KV caches


@pytest.fixture
def nan_sent():
    """Sends NaN in one norm of that version, and mends it on the trainer."""

    def send(one, version):
        parameter = one.trainers[version].get_parameter(NORM)
        good = parameter.detach().clone()
        try:
            with torch.no_grad():
                parameter.fill_(float("nan"))
            push(one, version, check_finite=False)
        finally:
            with torch.no_grad():
                parameter.copy_(good)

    return send


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_nan_does_not_survive_in_the_kv_cache(subject, nan_sent, kind):
    one = subject(kind)
    nan_sent(one, NEW)
    assert any(math.isnan(p) for _, logprobs in generate(one.engine) for p in logprobs)
    push(one, NEW)
    assert one.generates_as(NEW)
    assert one.wrong_weights(NEW) == []


def test_nan_would_survive_there(subject, nan_sent, monkeypatch):
    """What the test above would find otherwise: it can fail."""
    one = subject("dense")
    nan_sent(one, NEW)
    generate(one.engine)
    with monkeypatch.context() as patched:
        patched.setattr(compat, "zero_kv_caches", lambda config: 0)
        push(one, NEW)
    assert not one.generates_as(NEW)
    compat.zero_kv_caches(compat.in_process_parts(one.engine).vllm_config)
    one.engine.reset_prefix_cache()
    assert one.generates_as(NEW)


def test_caches_are_overwritten_after_a_failure_and_kept_otherwise(subject, monkeypatch):
    one = subject("dense")
    overwritten = []
    zero = compat.zero_kv_caches
    monkeypatch.setattr(compat, "zero_kv_caches", lambda c: overwritten.append(zero(c)))
    push(one, NEW)
    push(one, OLD)
    assert overwritten == []

    class Cut(HFSource):
        def materialize(self, names):
            yield from list(super().materialize(names))[:3]

    with pytest.raises(CoverageError, match="ended where"):
        session(one, Cut(one.trainers[NEW])).push()
    push(one, NEW)
    assert len(overwritten) == 1
    assert overwritten[0] > 0
    push(one, NEW)
    assert len(overwritten) == 1


# ---------------------------------------------------------------------------------- checksums


def stepped(model, *names):
    """A source of the model with other values in these parameters (all: none are named)."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if not names or name in names:
                parameter.view(-1)[:: max(parameter.numel() // 50, 1)] += 0.01
    return HFSource(twin)


def wrapped() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """As TorchAO's quantised weights are: what its bytes are in, too."""
    model, parts = torch.nn.Module(), [torch.ones(8, dtype=torch.int8), torch.ones(2)]
    model.register_buffer("weight", TwoTensors(*parts))
    return model, parts


def shared() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """As the transforms of compressed-tensors are."""
    from vllm.model_executor.parameter import SharedWeightParameter

    model = torch.nn.Module()
    model.weight = SharedWeightParameter(weight_loader=lambda *arguments: None)
    for index in range(2):
        model.weight.add_partition(index, object(), 3, 5)
    return model, [part.data.fill_(1) for part in model.weight.partitions.values()]


@pytest.mark.parametrize("make", [wrapped, shared])
def test_weights_inside_of_a_parameter_are_seen(subject, make):
    subject("dense")  # vLLM's parameters ask for the process groups of an engine
    model, parts = make()
    for digests in (kernel_checksums, kernel_digests):
        for part in parts:
            before = digests(model)
            part[0] += 1
            assert digests(model) != before
            part[0] -= 1
            assert digests(model) == before


def test_a_weight_that_is_quantised_inside_may_stay_as_it_is(subject):
    """It passes for one of the engine's dtype, and does not change with each step."""
    check = KernelCheck(subject("dense").model, LayerMap({}, {}), torch.float32, None)
    assert check._keeps(torch.ones(3))
    assert not check._keeps(torch.ones(3, dtype=torch.int8))
    (weight,) = wrapped()[0].buffers()
    assert weight.dtype == torch.float32
    assert not check._keeps(weight)


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        *product(["dense", "bias", "tied", "moe"], ["stock", "plain"]),
        ("padded", "stock"),
        ("dense", "fp8"),
    ],
)
def test_right_syncs_pass(subject, kind, kernels):
    """All new, nothing new, a part new, a bias and a norm: no false alarm."""
    one = subject(kind, kernels)
    model = one.trainers[NEW]
    some = [n for n, _ in model.named_parameters() if "layers.1.mlp" in n or n.endswith("bias")]
    for source in (
        HFSource(model),
        HFSource(one.trainers[OLD]),
        HFSource(one.trainers[OLD]),
        stepped(one.trainers[OLD], *some),
        stepped(one.trainers[OLD], *some, NORM),
        stepped(one.trainers[OLD]),
        HFSource(model),
    ):
        report = session(one, source, verify="checksum").push()
        assert report.seconds["verify"] > 0
        assert report.workers[0]["seconds"]["verify"] > 0
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)


@pytest.mark.parametrize(
    ("kind", "where", "cure", "layer"),
    [
        ("tied", refresh, "after_reload", "lm_head"),
        ("moe", compat, "forget_packed_experts", "mlp.experts"),
    ],
)
def test_packed_copies_that_stay_old_are_found(subject, monkeypatch, kind, where, cure, layer):
    """What stock vLLM does, silently."""
    one = subject(kind)
    require_packed(one.model, layer)
    push(one, OLD, verify="checksum")
    with monkeypatch.context() as patched:
        patched.setattr(where, cure, lambda of: None)
        patched.setattr(refresh, "heads_of", lambda *of: [])
        with pytest.raises(CoverageError, match=rf"{layer}.*(the same as before|not packed)"):
            push(one, NEW, verify="checksum")
    with pytest.raises(PoisonedError, match=layer):
        generate(one.engine)
    push(one, NEW, verify="checksum")
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)


def test_a_kernel_that_something_else_has_written_to_is_found(subject, monkeypatch):
    one = subject("dense", "plain")
    push(one, OLD, verify="checksum")

    def scribble(model):
        model.model.norm.weight.data[3] += 1
        return []

    with monkeypatch.context() as patched:
        patched.setattr(refresh, "after_reload", scribble)
        with pytest.raises(CoverageError, match=r"'model\.norm' got the same weights as in the la"):
            push(one, OLD, verify="checksum")


def test_without_checksums_the_next_sync_has_nothing_to_compare_with(subject, monkeypatch):
    one = subject("tied")
    require_packed(one.model, "lm_head")
    push(one, OLD, verify="checksum")
    push(one, NEW)
    monkeypatch.setattr(refresh, "after_reload", lambda model: [])
    monkeypatch.setattr(refresh, "heads_of", lambda *of: [])
    push(one, OLD, verify="checksum")
    monkeypatch.undo()
    assert one.wrong_weights(OLD) == [f"linear {HEAD}"]


@pytest.mark.parametrize("carrier", ["shm", "tcp"])
def test_checksums_over_a_connection(remote, carrier):
    engine = remote("own process")
    with session_over(engine, HFSource(engine.trainers[NEW]), carrier) as sync:
        for _ in range(2):
            report = sync.push()
            assert report.seconds["verify"] > 0
            assert report.workers[0]["seconds"]["verify"] > 0
    assert engine.wrong_weights(NEW) == []
    assert engine.generates_as(NEW)


def test_bytes_that_change_on_the_way_are_found(remote, monkeypatch):
    """The trainer's slot is written to after the checksum was taken: two signs flip."""
    engine = remote("in process")
    stage = staging.Staging._copy

    def spoil(self, index, *arguments):
        staged = stage(self, index, *arguments)
        if index == 2:
            for sign in (7, 15):
                staged.pieces[0].bytes[sign] ^= 0x80
        return staged

    monkeypatch.setattr(staging.Staging, "_copy", spoil)
    with session_over(engine, HFSource(engine.trainers[NEW]), "shm") as sync:
        with pytest.raises(CoverageError, match=r"weight' of chunk 2 arrived with checksum"):
            sync.push()
        monkeypatch.undo()
        sync.push()
    assert engine.wrong_weights(NEW) == []


def session_over(engine, source, carrier):
    return remote_session(engine, source, transport=carrier, chunk_bytes="40KiB", verify="checksum")


SHAPES = [(), (0,), (7,), (512,), (64, 64), (4096,), (300, 257)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e5m2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_checksum_sees_every_bit(shape, dtype):
    torch.manual_seed(0)
    one = torch.randn(shape).to(dtype)
    right = checksum(one)
    assert checksum(one.clone()) == right
    bits = one.view(-1).view(torch.uint8)
    for at in range(0, bits.numel(), max(bits.numel() // 20, 1)):
        bits[at] ^= 1 << (at % 8)
        assert checksum(one) != right
        bits[at] ^= 1 << (at % 8)
    assert checksum(one) == right


def test_a_checksum_sees_swapped_pages_and_words_and_reads_any_view():
    pages = torch.randn(8, 1024)
    swapped = pages[[0, 1, 5, 3, 4, 2, 6, 7]]
    assert checksum(swapped) != checksum(pages)
    assert checksum(swapped.contiguous()) == checksum(swapped)
    words = pages.flip(1)
    assert checksum(words) != checksum(pages)
    odd = torch.empty(1001, dtype=torch.uint8)[1:]
    odd.copy_(torch.arange(1000))
    assert checksum(odd) == checksum(odd.clone())


def on_an_accelerator(tensor):
    """What `fingerprint` hashes of whole pages there; the reduction runs on any device."""
    raw = tensor.contiguous().view(-1).view(torch.uint8)
    assert raw.numel() % PAGE_BYTES == 0
    return page_sums(raw).tolist()


@pytest.mark.parametrize("hashed", [checksum, on_an_accelerator])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_signs_that_flip_and_words_that_change_places_are_seen(hashed, dtype):
    torch.manual_seed(0)
    right = torch.randn(4 * PAGE_BYTES // dtype.itemsize).to(dtype)
    half = len(right) // 2
    wrong = {"all": -right, "swapped": torch.cat([right[half:], right[:half]]), "": right.flip(0)}
    for pair in [(0, 1), (3, 7), (1, half)]:
        wrong[f"signs of {pair}"] = right.clone()
        wrong[f"signs of {pair}"][list(pair)] *= -1
        wrong[f"places of {pair}"] = right.clone()
        wrong[f"places of {pair}"][list(pair)] = right[list(pair)[::-1]]
    # Words that differ in their top bits alone.
    signs = wrong["alternating"] = torch.ones_like(right)
    signs[::2] = -1
    wrong["alternating, moved"] = signs.roll(1)
    found = {str(hashed(one)) for one in [right, *wrong.values()]}
    assert len(found) == 1 + len(wrong)


# ------------------------------------------------------------------------------ log-probabilities


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_engine_says_what_the_trainer_says(subject, kind):
    one = subject(kind)
    with full_session(one, one.trainers[NEW]) as sync:
        report = sync.push()
    assert 0 < report.probe_gap < 1e-5
    assert one.generates_as(NEW)


def test_an_engine_that_says_something_else_is_poisoned(subject):
    """The source reads another model than the one that is trained."""
    one = subject("dense")
    sync = full_session(one, one.trainers[NEW], source=HFSource(one.trainers[OLD]))
    with pytest.raises(
        CoverageError, match=r"version \d+.*part from the trainer's by \d.*poisoned"
    ):
        sync.push()
    assert not sync.current
    with pytest.raises(PoisonedError, match="part from the trainer's"):
        generate(one.engine)
    assert full_session(one, one.trainers[NEW]).push().probe_gap < 1e-5
    assert one.generates_as(NEW)


def test_an_engine_that_cannot_be_asked_is_poisoned(subject, monkeypatch):
    one = subject("dense")
    sync = full_session(one, one.trainers[NEW])
    monkeypatch.setattr(sync._transport, "prompt_logprobs", lambda tokens: 1 / 0)
    with pytest.raises(CoverageError, match=r"could not be verified.*division.*is poisoned"):
        sync.push()
    with pytest.raises(PoisonedError, match="could not be verified"):
        generate(one.engine)
    monkeypatch.undo()
    assert sync.push().probe_gap < 1e-5
    assert one.generates_as(NEW)


def test_a_probe_leaves_the_models_modes_as_they_are(subject):
    model = subject("dense").trainers[OLD]
    model.train()
    model.model.layers[0].eval()
    try:
        before = [module.training for module in model.modules()]
        probe = probe_of(model)
        probe.logprobs(probe.token_ids)
        assert [module.training for module in model.modules()] == before
        assert len(set(before)) == 2
    finally:
        model.eval()


def test_quantised_engines_need_a_tolerance(subject):
    one = subject("dense", "fp8")
    with pytest.raises(ConfigError, match=r"fp8_per_channel.*verify_tolerance"):
        full_session(one, one.trainers[NEW]).push()
    assert one.wrong_weights(OLD) == [], "before anything was sent"
    report = full_session(one, one.trainers[NEW], verify_tolerance=2.0).push()
    assert report.probe_gap > 1e-4
    assert one.generates_as(NEW)


@pytest.mark.parametrize("name", ["own process", "async", "server"])
def test_engines_elsewhere_are_asked(remote, name):
    engine = remote(name)
    config = SyncConfig.of(verify="full", timeout_seconds=60)
    right, wrong = (probe_of(engine.trainers[version]) for version in (NEW, OLD))
    source = HFSource(engine.trainers[NEW])
    with (
        SyncSession(source, remote_transport(config, engine.client()), config, probe=wrong) as sync,
        pytest.raises(CoverageError, match="part from the trainer's"),
    ):
        sync.push()
    transport = remote_transport(config, engine.client())
    with SyncSession(source, transport, config, probe=right) as sync:
        assert sync.push().probe_gap < 1e-5
    assert engine.wrong_weights(NEW) == []
    assert engine.generates_as(NEW)


def test_full_needs_a_probe(subject):
    with pytest.raises(ConfigError, match="probe_of"):
        push(subject("dense"), NEW, verify="full")


def full_session(one, trainer, source=None, **options):
    config = SyncConfig.of(verify="full", **options)
    transport = InProcessTransport(one.engine)
    return SyncSession(source or HFSource(trainer), transport, config, probe=probe_of(trainer))


@pytest.mark.parametrize(("context_tokens", "taken"), [(0, 5), (6, 5), (5, 4), (3, 2)])
def test_the_prompt_fits_the_engine(context_tokens, taken):
    assert shortened((1, 2, 3, 4, 5), context_tokens) == (1, 2, 3, 4, 5)[:taken]


def test_an_engine_too_short_for_a_prompt_is_named_before_anything_is_sent(subject, monkeypatch):
    one = subject("dense")
    sync = full_session(one, one.trainers[NEW])
    monkeypatch.setattr(Receiver, "context_tokens", 2)
    with pytest.raises(ConfigError, match="max_model_len is 2"):
        sync.push()
    assert sync.version == 0
    assert sync.plan is None
    monkeypatch.setattr(Receiver, "context_tokens", 9)
    assert sync.push().probe_gap < 1e-5
