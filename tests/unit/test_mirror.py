"""What was sent last, and what has changed since."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qerl_sync import RemoteTransport, Source, SyncConfig, SyncSession
from qerl_sync.bench.echo import EchoWorker
from qerl_sync.bench.echo import checksum as crc32
from qerl_sync.errors import TransportError
from qerl_sync.meta import ParamMeta
from qerl_sync.verify.checksum import checksum
from qerl_sync.wire.mirror import WHOLE, Mirror, mirror_bytes, travelling

DTYPES = ("bfloat16", "float32", "float16", "float8_e4m3fn", "float64", "int64", "bool")


def random_bits(numel: int, dtype: str, seed: int) -> torch.Tensor:
    """Any bits at all: NaN of every kind, both zeros."""
    generator = torch.Generator().manual_seed(seed)
    itemsize = getattr(torch, dtype).itemsize
    high = 2 if dtype == "bool" else 256
    raw = torch.randint(0, high, (numel * itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(getattr(torch, dtype))


@settings(deadline=None)
@given(
    numel=st.integers(0, 3000) | st.sampled_from([65_535, 65_537, 200_000]),
    dtype=st.sampled_from(DTYPES),
    places=st.lists(st.floats(0, 1, exclude_max=True), max_size=300),
)
def test_changes_put_into_what_was_sent_last_are_the_tensor_to_the_bit(numel, dtype, places):
    meta = ParamMeta("a", dtype, (numel,))
    old, other = random_bits(numel, dtype, 0), random_bits(numel, dtype, 1)
    new = old.clone()
    at = torch.tensor([int(place * numel) for place in places], dtype=torch.long)
    if numel:
        new[at] = other[at]
    trainer, worker = Mirror([meta]), Mirror([meta])
    trainer.take("a", old)
    worker.apply([meta], [old], [])
    for value in (new, old, old):
        sent, change = trainer.changes("a", value)
        (coming,) = travelling([meta], [change])
        assert coming.nbytes == sent.nbytes <= meta.nbytes
        (found,) = worker.apply([meta], [sent.clone()], [change])
        assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))


def test_one_element_in_a_hundred_costs_less_than_a_twentieth_of_the_tensor():
    meta = ParamMeta("a", "bfloat16", (1000, 1000))
    old = torch.randn(1000, 1000).bfloat16()
    mirror = Mirror([meta])
    mirror.take("a", old)
    sent, change = mirror.changes("a", torch.where(torch.rand(1000, 1000) < 0.01, -old, old))
    assert change != WHOLE
    assert sent.nbytes < 0.02 * meta.nbytes
    sent, change = mirror.changes("a", torch.randn(1000, 1000).bfloat16())
    assert change == WHOLE
    assert sent.nbytes == meta.nbytes == mirror_bytes([meta])


@pytest.mark.parametrize("change", [(1, 3), (-1, 1), (0, 1), (10, 1), (2**62, 4), (1, 0)])
def test_changes_that_cannot_be_are_refused(change):
    with pytest.raises(TransportError):
        travelling([ParamMeta("a", "bfloat16", (10,))], [change])


def test_a_change_outside_of_its_tensor_is_refused():
    meta = ParamMeta("a", "bfloat16", (100,))
    mirror = Mirror([meta])
    raw = torch.tensor([0, 0, 0, 0, 99, 1], dtype=torch.uint8)
    with pytest.raises(TransportError):
        mirror.apply([meta], [raw], [(2, 1)])
    assert mirror.version is None


def test_a_mirror_has_a_version_only_while_it_is_one():
    meta = ParamMeta("a", "float32", (2,))
    mirror = Mirror([meta])
    mirror.version = 1
    mirror.changes("a", torch.ones(2))
    assert mirror.version is None


class Weights(Source):
    stamps_content = True

    def __init__(self):
        torch.manual_seed(0)
        self.tensors = {f"layer.{i}": torch.randn(300, 500).bfloat16() for i in range(6)}

    def metadata(self):
        return [ParamMeta(name, "bfloat16", (300, 500)) for name in self.tensors]

    def content_stamps(self):
        return {name: checksum(tensor) for name, tensor in self.tensors.items()}

    def materialize(self, names):
        for name in names:  # memory that is the source's again with the next tensor
            yield name, self.tensors[name].clone()

    def step(self):
        for tensor in self.tensors.values():
            tensor[torch.rand(tensor.shape) < 0.01] *= -1


@pytest.mark.slow
def test_changes_reach_another_process_over_tcp():
    weights = Weights()
    with EchoWorker() as worker:
        transport = RemoteTransport(worker, transport="tcp")
        config = SyncConfig.of(delta="elements", chunk_bytes="700KiB", verify="checksum")
        with SyncSession(weights, transport, config) as session:
            worker.check(True)
            full = session.push()
            assert full.delta["sent"] == "everything"
            for _ in range(3):
                weights.step()
                report = session.push()
                assert report.delta == {"sent": "elements", "reason": ""}
                assert report.wire_bytes <= 0.02 * full.wire_bytes
                assert report.sent_bytes == full.sent_bytes
                assert report.mirror_bytes == report.workers[0]["mirror_bytes"] > 0
                right = {name: crc32(tensor) for name, tensor in weights.tensors.items()}
                assert worker.checksums() == right
            weights.tensors["layer.3"][7, 9] += 1
            report = session.push()
            assert session.plan.order == ("layer.3",)
            assert report.wire_bytes < 100
            assert worker.checksums() == {"layer.3": crc32(weights.tensors["layer.3"])}

            transport.disconnect()
            weights.step()
            report = session.push()
            assert report.delta["sent"] == "everything"
            assert report.delta["reason"]
            assert session.push().delta["sent"] == "elements"
