"""Tensors beside the parameters that kernels read: views of them, what is derived from them, and
parameters that were emptied or changed after they had been loaded."""

from __future__ import annotations

import re

import pytest
import torch
from support import bare
from support.engines import NEW, OLD, kernels_in_use
from support.fingerprint import difference, fingerprint
from support.models import make_model, save_model

from qerl_sync import HFSource
from qerl_sync.errors import CoverageError, LayerMapError, LoadError, StaleBaseError
from qerl_sync.options import SyncOptions
from qerl_sync.plan.sync_plan import build_plan
from qerl_sync.worker.load.aliases import LostView, lost_views
from qerl_sync.worker.load.receiver import Receiver

pytestmark = pytest.mark.vllm

MLP = "model.layers.1.mlp"
DOWN = f"{MLP}.down_proj"


class Pair:
    """A model on version 0, the trainer's models, and what fresh models of each hold."""

    def __init__(self, trainers, directory, **arguments):
        self.trainers = trainers
        paths = [save_model(one, directory / str(seed)) for seed, one in enumerate(trainers)]
        models = [bare.load(path, **arguments) for path in paths]
        self.parts = models[OLD]
        self.model = self.parts.model
        self.weights = [fingerprint(one.model) for one in models]
        assert difference(*self.weights), "both versions are the same: the test could not fail"

    def sync(self, version, **options):
        bare.sync(self.parts, self.trainers[version], **options)

    def wrong_weights(self, version):
        return difference(fingerprint(self.model), self.weights[version])


@pytest.fixture
def dense(subject, tmp_path):
    """With parameters as they are on GPUs. Each test may do to it what it likes."""
    subject("dense")
    with kernels_in_use("plain"):
        yield Pair([make_model("dense", seed) for seed in (OLD, NEW)], tmp_path)


def randomised(config, seed, build=None):
    import transformers

    torch.manual_seed(seed)
    build = build or transformers.AutoModelForCausalLM.from_config
    model = build(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


# ------------------------------------------------------------------------- views lost by packing


@pytest.fixture
def mamba(subject, tmp_path, monkeypatch):
    """Mamba-2, its convolutions packed as on CPUs with AVX512_BF16: into memory of their own."""
    from transformers import Mamba2Config
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils

    subject("dense")
    pack_others = utils.dispatch_cpu_unquantized_gemm

    def pack(layer, remove_weight):
        with monkeypatch.context() as patched:
            patched.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
            patched.setattr(_custom_ops, "causal_conv1d_weight_pack", lambda w: w.clone().flip(0))
            pack_others(layer, remove_weight=remove_weight)

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", pack)
    config = Mamba2Config(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        state_size=16,
        num_heads=4,
        head_dim=32,
        n_groups=1,
    )
    return Pair([randomised(config, seed) for seed in (OLD, NEW)], tmp_path)


def test_the_convolutions_of_mamba_2_are_new(mamba):
    for version in (NEW, OLD, NEW):
        mamba.sync(version, verify="checksum")
        assert mamba.wrong_weights(version) == []


def test_a_convolution_that_stays_old_is_found(mamba, monkeypatch):
    mamba.sync(NEW, verify="checksum")
    monkeypatch.setattr(LostView, "renew", lambda view: None)
    if not lost_views(mamba.model):  # vLLM 0.32 keeps the view
        mamba.sync(OLD, verify="checksum")
        assert mamba.wrong_weights(OLD) == []
        return
    with pytest.raises(CoverageError, match="mixer"):
        mamba.sync(OLD, verify="checksum")


def test_a_rollback_brings_old_convolutions_back(mamba):
    with (
        pytest.raises(ZeroDivisionError),
        bare.started(mamba.parts, HFSource(mamba.trainers[NEW]), on_failure="rollback"),
    ):
        raise ZeroDivisionError
    assert mamba.wrong_weights(OLD) == []
    mamba.sync(NEW)
    assert mamba.wrong_weights(NEW) == []


def norms_with_a_lost_view(model):
    """Two norms of one size, and a buffer that was a view of the one until that moved."""
    attention = model.model.layers[0].self_attn
    attention.register_buffer("lost", attention.q_norm.weight.data, persistent=False)
    attention.q_norm.weight.data = attention.q_norm.weight.data.clone()
    return attention


def test_a_lost_view_is_told_by_its_values(dense):
    attention = norms_with_a_lost_view(dense.model)
    dense.sync(NEW)
    assert attention.lost.equal(attention.q_norm.weight)
    assert not attention.lost.equal(attention.k_norm.weight)


def test_a_lost_view_of_nobody_knows_what_is_refused_before_the_first_byte(dense):
    attention = norms_with_a_lost_view(dense.model)
    attention.k_norm.weight.data.copy_(attention.q_norm.weight.data)
    before = fingerprint(dense.model)
    with pytest.raises(LayerMapError, match=r"self_attn\.lost"):
        dense.sync(NEW)
    assert fingerprint(dense.model) == before
    assert Receiver(dense.parts).poisoned is None


# ------------------------------------------------------------------ views, and what is derived


def test_a_view_taken_while_packing_is_one_of_the_live_parameter(dense, monkeypatch):
    """Kernels that captured graphs have read the memory that it had first."""
    layer = dense.model.get_submodule(DOWN)
    method = type(layer.quant_method)
    process = method.process_weights_after_loading

    def with_views(self, layer):
        process(self, layer)
        layer.views = [layer.weight.data.t()]
        layer.named = {"rows": layer.weight.data[:8]}
        layer.register_buffer("flat", layer.weight.data.view(-1), persistent=False)

    monkeypatch.setattr(method, "process_weights_after_loading", with_views)
    layer.quant_method.process_weights_after_loading(layer)
    addresses = [layer.views[0].data_ptr(), layer.named["rows"].data_ptr(), layer.flat.data_ptr()]
    dense.sync(NEW)
    now = [layer.views[0].data_ptr(), layer.named["rows"].data_ptr(), layer.flat.data_ptr()]
    assert now == addresses
    assert layer.views[0].equal(layer.weight.t())
    assert layer.named["rows"].equal(layer.weight[:8])
    assert layer.flat.equal(layer.weight.view(-1))
    # A fresh engine's layers were packed before they took views.
    own = re.compile(r"\.(views\.0|named\.rows|flat)$")
    assert [key for key in dense.wrong_weights(NEW) if not own.search(key)] == []


def test_a_view_that_cannot_be_one_again_ends_the_sync(dense, monkeypatch):
    layer = dense.model.get_submodule(DOWN)
    layer.view = layer.weight.data.t()
    method = type(layer.quant_method)
    monkeypatch.setattr(
        method,
        "process_weights_after_loading",
        lambda self, layer: setattr(layer, "view", layer.weight.data[:3].clone()),
    )
    with pytest.raises(LoadError, match=r"down_proj\.view"):
        dense.sync(NEW)
    assert "down_proj.view" in Receiver(dense.parts).poisoned


def test_a_buffer_that_packing_derives_is_derived_anew(dense, monkeypatch):
    layer = dense.model.get_submodule(DOWN)
    method = type(layer.quant_method)
    process = method.process_weights_after_loading

    def with_sums(self, layer):
        process(self, layer)
        layer.register_buffer("sums", layer.weight.data.sum(0), persistent=False)

    monkeypatch.setattr(method, "process_weights_after_loading", with_sums)
    layer.quant_method.process_weights_after_loading(layer)
    address = layer.sums.data_ptr()
    dense.sync(NEW)
    assert layer.sums.equal(layer.weight.sum(0))
    assert layer.sums.data_ptr() == address


# -------------------------------------------------------- parameters that are not as when loaded


def test_a_parameter_that_was_emptied_is_loaded_again(dense):
    for version in (NEW, OLD):
        for path in (DOWN, "model.norm"):
            emptied = torch.nn.Parameter(torch.empty(0), requires_grad=False)
            dense.model.get_submodule(path).weight = emptied
        dense.sync(version)
        assert dense.wrong_weights(version) == []


def test_a_rollback_empties_it_again(dense):
    layer = dense.model.get_submodule(DOWN)
    layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    with (
        pytest.raises(ZeroDivisionError),
        bare.started(dense.parts, HFSource(dense.trainers[NEW]), on_failure="rollback"),
    ):
        raise ZeroDivisionError
    assert layer.weight.numel() == 0
    dense.sync(NEW)
    assert dense.wrong_weights(NEW) == []


def test_a_parameter_of_another_size_is_refused_before_the_first_byte(dense):
    dense.model.model.norm.weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    before = fingerprint(dense.model)
    with pytest.raises(LayerMapError, match=r"model\.norm\.weight"):
        dense.sync(NEW)
    assert fingerprint(dense.model) == before
    assert Receiver(dense.parts).poisoned is None


def test_a_processed_parameter_of_another_size_is_named(dense):
    layer = dense.model.get_submodule(DOWN)
    layer.weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    with pytest.raises(LoadError, match=rf"{DOWN}\.weight"):
        dense.sync(NEW)


@pytest.fixture
def latent(subject, tmp_path, monkeypatch):
    """DeepSeek-V2. Its attention packs `kv_b_proj` and empties it, as on CPUs with AMX."""
    from transformers import DeepseekV2Config
    from vllm.model_executor.layers.attention.mla_attention import MLAAttention
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not hasattr(AttentionBackendEnum, "CPU_MLA"):
        pytest.skip("this vLLM has no AttentionBackendEnum.CPU_MLA: latent attention needs a GPU")
    subject("dense")

    def pack_and_empty(self, act_dtype):
        self.impl.packed = self.kv_b_proj.weight.data.flip(0).clone()
        self.kv_b_proj.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    monkeypatch.setattr(MLAAttention, "process_weights_after_loading", pack_and_empty)
    config = DeepseekV2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=512,
        q_lora_rank=None,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        first_k_dense_replace=2,
    )
    return Pair([randomised(config, seed) for seed in (OLD, NEW)], tmp_path)


def fail_after(step):
    step()
    raise LoadError("no more")


def test_latent_attention_that_frees_its_projection(latent):
    def packed():
        layers = latent.model.model.layers
        return torch.cat([layer.self_attn.mla_attn.mla_attn.impl.packed for layer in layers])

    def right(version):
        layers = latent.trainers[version].model.layers
        return torch.cat([layer.self_attn.kv_b_proj.weight.flip(0) for layer in layers])

    assert packed().equal(right(OLD))
    for version in (NEW, OLD):
        latent.sync(version, verify="checksum")
        assert packed().equal(right(version))
        assert latent.wrong_weights(version) == []
    # Each reload takes the projection anew: it cannot stay behind.
    latent.sync(OLD, is_base=True)
    receiver = Receiver(latent.parts)
    metas = HFSource(latent.trainers[OLD]).metadata()
    layer_map = receiver.layer_map(metas)
    norm = build_plan([m for m in metas if m.name == "model.norm.weight"], layer_map, "warn")
    with pytest.raises(StaleBaseError):
        receiver.start(norm, layer_map, SyncOptions(base=receiver.version))
    assert packed().equal(right(OLD))
    failing = bare.started(latent.parts, HFSource(latent.trainers[NEW]), on_failure="rollback")
    with pytest.raises(LoadError), failing as receiver:
        fail_after(receiver.finish)
    assert packed().equal(right(OLD))
    assert latent.wrong_weights(OLD) == []


# ------------------------------------------------------- what vLLM's checkpoint loading never fills

TEXT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
}
VISION = {"depth": 2, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
TOKENS = {"image_token_id": 250, "video_token_id": 251}
VISION_LANGUAGE = {
    "Qwen2VL": (TEXT, {**VISION, "embed_dim": 64, "mlp_ratio": 2}),
    "Qwen2_5_VL": (
        TEXT,
        {**VISION, "intermediate_size": 96, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
    ),
    "Qwen3VL": (
        {**TEXT, "head_dim": 16},
        {
            **VISION,
            "intermediate_size": 96,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 64,
        },
    ),
}


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_vision_language_models(subject, tmp_path, monkeypatch, family):
    """Qwen2-VL and Qwen2.5-VL keep mean and deviation of their image processor as buffers."""
    import transformers

    # An older vLLM keeps no such buffers.
    mm_input_norm = pytest.importorskip("vllm.model_executor.layers.fusion.mm_input_norm")
    subject("dense")
    # The processor that has them needs torchvision.
    norm = mm_input_norm.NormParams([0.48, 0.45, 0.40], [0.27, 0.26, 0.28], 1 / 255)
    monkeypatch.setattr(mm_input_norm, "_load_norm_params", lambda config: norm)
    text, vision = VISION_LANGUAGE[family]
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=vision, **TOKENS
    )
    build = getattr(transformers, f"{family}ForConditionalGeneration")
    pair = Pair([randomised(config, seed, build._from_config) for seed in (OLD, NEW)], tmp_path)
    pair.sync(NEW)
    assert pair.wrong_weights(NEW) == []
