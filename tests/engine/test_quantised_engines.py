"""What an engine says of its quantisation; one that quantises nothing is refused."""

from __future__ import annotations

import pytest
import torch
from support.engines import NEW, OLD, generate
from support.models import make_model, save_model
from support.syncs import push, session

from qerl_sync import ConfigError, HFSource, InProcessTransport, SyncConfig, SyncSession
from qerl_sync.errors import CoverageError
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.load.receiver import Receiver

pytestmark = pytest.mark.vllm


def test_a_report_says_what_is_quantised_and_what_is_not(subject):
    said = push(subject("dense", "fp8"), NEW).quantisation
    assert (said["scheme"], said["from_checkpoint"]) == ("fp8_per_channel", False)
    assert said["bits"] == {"8": 8, "16": 2}, "four linear layers in each of two; embeddings, head"
    assert set(said["high_precision"]) == {"lm_head", "model.embed_tokens"}
    said = push(subject("dense"), NEW).quantisation
    assert said["scheme"] is None
    assert said["high_precision"] == {}


def test_an_engine_that_quantises_nothing_is_refused_before_the_first_byte(engine_pool, tmp_path):
    """The scheme is for experts only, and vLLM says nothing of a model that has none."""
    path = save_model(make_model("dense", OLD), tmp_path)
    quantised = {"quantization": "int8_per_channel_weight_only", "dtype": "bfloat16"}
    engine = engine_pool.start(path, **quantised)
    before = generate(engine)
    source = HFSource(make_model("dense", NEW))
    sync = SyncSession(source, InProcessTransport(engine), SyncConfig())
    with pytest.raises(ConfigError) as caught:
        sync.push()
    assert caught.value.scheme == "int8_per_channel_weight_only"
    assert generate(engine) == before


def test_a_sync_that_leaves_a_layer_in_high_precision_fails(subject, monkeypatch):
    one = subject("dense", "fp8")
    sync = session(one, HFSource(one.trainers[NEW]))
    sync.push()
    path = "model.layers.1.mlp.down_proj"
    layer = one.model.get_submodule(path)
    reload, own = compat.finish_reload, layer.weight.data

    def spoil(*args, **options):
        reload(*args, **options)
        layer.weight.data = layer.weight.data.bfloat16()

    with monkeypatch.context() as patch:
        patch.setattr(compat, "finish_reload", spoil)
        with pytest.raises(CoverageError) as caught:
            sync.push()
    layer.weight.data = own
    assert caught.value.layer == path


@pytest.mark.parametrize(("tiles", "half"), [(True, False), (True, True), (False, False)])
def test_a_cpu_that_multiplies_fp8_by_a_reference_loop_is_warned_of(
    subject, monkeypatch, caplog, tiles, half
):
    one = subject("dense", "fp8")
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"amx_tile": tiles, "amx_fp16": half}
    )
    receiver = Receiver(compat.in_process_parts(one.engine))
    receiver._state.quantised = None  # as before the first sync
    receiver.layer_map(HFSource(one.trainers[NEW]).metadata())
    warned = [r.getMessage() for r in caplog.records if "reference loop" in r.getMessage()]
    assert bool(warned) == (tiles and not half)
    if warned:
        assert "self_attn.qkv_proj" in warned[0]
        assert 'quantization="fp8_per_block"' in warned[0]
