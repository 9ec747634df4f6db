"""The layer map without an engine: equal to a live one, cached, honest about what it is."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support.layer_maps import MODELS, keep_recorded_maps, recorded
from support.models import CONFIGS
from support.probes import ENGINE, FAMILIES, PAST_RELOAD, READING, REFUSED, config_json, probed

from qerl_sync.errors import CompatError, ConfigError, CoverageError, LayerMapError
from qerl_sync.meta import ParamMeta
from qerl_sync.offline import layer_map as offline
from qerl_sync.offline import map_cache
from qerl_sync.offline.layer_map import offline_map
from qerl_sync.plan.checkpoint import read_checkpoint
from qerl_sync.plan.recorded_map import recorded_maps
from qerl_sync.worker.compat.coupling import vllm_version

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    """A model directory without weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config_json(CONFIGS["dense"]())))
    return directory


# ------------------------------------------------------------------------ equal to live engines


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("kind", "kernels"), [*((kind, "stock") for kind in CONFIGS), ("dense", "fp8")]
)
def test_equals_the_map_of_a_live_engine(subject, kind, kernels):
    from support.engines import OLD

    from qerl_sync import HFSource
    from qerl_sync.worker.compat import engine as compat
    from qerl_sync.worker.load.observe import observe_layer_map

    live, fp8 = subject(kind, kernels), ", fp8" * (kernels == "fp8")
    found = probed()[f"live {kind}{fp8}"]
    assert not isinstance(found, str), found
    assert found.metas == HFSource(live.trainers[OLD]).metadata()
    parts = compat.in_process_parts(live.engine)
    observed = observe_layer_map(parts.model, parts.vllm_config, found.metas, load="layerwise")
    assert found.layer_map == observed
    assert found.layer_map.digest == observed.digest


@pytest.mark.vllm
@pytest.mark.parametrize("kind", READING)
def test_constructors_may_read_the_values_of_small_tensors(kind):
    found = probed()[kind]
    assert not isinstance(found, str), found
    assert len(found.metas) == READING[kind][1]
    landed = [c.loaded_numel for lands in found.layer_map.contributions.values() for c in lands]
    assert sum(landed) == sum(meta.numel for meta in found.metas)


@pytest.mark.vllm
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_element_lands_and_every_layer_closes(kind):
    found = probed()[kind]
    assert not isinstance(found, str), found
    brought: Counter[str] = Counter()
    for meta in found.metas:
        (landed,) = found.layer_map.contributions[meta.name]
        assert (landed.loaded_numel, landed.held_bytes) == (meta.numel, meta.nbytes), meta
        brought[landed.parent_layer] += meta.numel
    layers = found.layer_map.layers
    assert brought == {name: layers[name].closes_at_numel for name in brought}
    at = "model.layers.0.self_attn"
    (qkv,) = {found.layer_map.parents(f"{at}.{one}_proj.weight") for one in "qkv"}
    assert qkv == (f"{at}.qkv_proj",)


# With tensors that the architecture's default configuration has not, and which were not recorded.
VARIANTS = {
    "gemma2, biased",
    "gemma3, own head",
    "llama, biased and tied",
    "qwen2_moe",
    "qwen2_moe, every other layer",
    "qwen3_moe",
}


@pytest.mark.vllm
@pytest.mark.parametrize("kind", FAMILIES)
def test_recorded_patterns_say_the_same_or_refuse(kind):
    found = probed()[kind]
    (architecture,) = config_json(FAMILIES[kind]())["architectures"]
    patterns = recorded_maps()[1][architecture]
    if kind in VARIANTS:
        with pytest.raises(LayerMapError) as refused:
            patterns.layer_map(found.metas)
        assert refused.value.tensor in found.layer_map.contributions
    else:
        assert landings(patterns.layer_map(found.metas)) == landings(found.layer_map)


@pytest.mark.vllm
@pytest.mark.parametrize("kind", MODELS)
def test_recorded_maps_are_what_the_installed_vllm_says(kind):
    found = probed()[f"recorded {kind}"]
    assert not isinstance(found, str), found
    assert found.metas == recorded()[kind].metas
    assert landings(found.layer_map) == landings(recorded()[kind].layer_map)


def landings(layer_map):
    """Where everything lands. vLLM's classes have other names in other versions, and a tied head to
    which nothing is sent is a layer of its own in some."""
    layers = {
        name: replace(layer, kind="", num_loads=0)
        for name, layer in layer_map.layers.items()
        if layer.expected_numel
    }
    return layers, layer_map.contributions, layer_map.elsewhere


@pytest.mark.vllm
def test_the_trainers_dtype_counts():
    own, told = probed()["live dense"], probed()["dense, sent in bfloat16"]
    assert {meta.dtype for meta in told.metas} == {"bfloat16"}
    assert [(m.name, m.shape) for m in told.metas] == [(m.name, m.shape) for m in own.metas]
    for name, (landed,) in own.layer_map.contributions.items():
        halved = landed._replace(held_bytes=landed.held_bytes // 2)
        assert told.layer_map.contributions[name] == (halved,)


@pytest.mark.vllm
def test_the_first_of_two_ranks_loads_half_and_holds_all():
    one, two = probed()["live moe"], probed()["two ranks"]
    assert two.metas == one.metas
    for kind, halves in (("RoutedExperts", 2), ("QKVParallelLinear", 2), ("RMSNorm", 1)):
        (name, *_) = (n for n, layer in one.layer_map.layers.items() if layer.kind == kind)
        whole, share = one.layer_map.layers[name], two.layer_map.layers[name]
        assert share.total_numel * halves == share.expected_numel * halves == whole.total_numel
    for name, contributions in one.layer_map.contributions.items():
        held = [c.held_bytes for c in contributions]
        assert [c.held_bytes for c in two.layer_map.contributions[name]] == held


@pytest.mark.vllm
def test_a_rank_holds_the_experts_of_other_ranks_too():
    found = probed()["two ranks of experts"].layer_map
    at = "model.layers.0.mlp.experts"
    for expert, loaded_numel in enumerate([96 * 64, 96 * 64, 0, 0]):
        (contribution,) = found.contributions[f"{at}.{expert}.up_proj.weight"]
        assert contribution.parent_layer == f"{at}.routed_experts"
        assert (contribution.loaded_numel, contribution.held_bytes) == (loaded_numel, 96 * 64 * 4)
    assert found.layers[f"{at}.routed_experts"].total_numel == 2 * 3 * 96 * 64


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("ignored bias", r"LayerMapError: .*accepts '.*o_proj\.bias' and does nothing"),
        ("bias that is not there", r"CoverageError: (?s:.*)qkv_proj\.bias .*0 of 128"),
    ],
)
def test_what_vllm_would_get_wrong_is_refused(kind, words):
    found = probed()[kind]
    assert isinstance(found, str)
    assert re.match(words, found), found


def test_all_refusals_are_tested():
    assert len(REFUSED) == 2


@pytest.mark.vllm
@pytest.mark.parametrize("kind", PAST_RELOAD)
def test_what_loaders_write_past_the_reload_is_planned_for(kind):
    """A live engine may refuse it: without one it is not known what its kernels hold."""
    found = probed()[kind]
    assert not isinstance(found, str), found
    layers = found.layer_map.layers
    written = {
        c.parent_layer
        for n in found.layer_map.past_reload
        for c in found.layer_map.contributions[n]
    }
    assert any(name.endswith("experts") for name in written)
    assert {layer.name for layer in layers.values() if layer.loading != "layerwise"} == written
    brought = sum(meta.numel for meta in found.metas)
    assert (
        sum(c.loaded_numel for cs in found.layer_map.contributions.values() for c in cs) == brought
    )


# --------------------------------------------------------------------------- the whole function


@pytest.mark.vllm
def test_observed_once_then_read(model, monkeypatch):
    import torch.distributed as dist

    grouped = dist.is_initialized()
    first = offline_map(model / "config.json", engine=ENGINE)
    assert (first.origin, first.vllm_version) == ("probe", vllm_version())
    assert dist.is_initialized() == grouped
    assert first.layer_map == probed()["live dense"].layer_map
    assert first.seconds.keys() == {"imports", "config", "names", "build", "probe"}

    second = offline_map(model, engine=ENGINE)  # the same config.json, named in another way
    assert second.origin == "cache"
    assert (second.metas, second.layer_map) == (first.metas, first.layer_map)

    program = (
        "import sys; from qerl_sync.offline.layer_map import offline_map; "
        f"print(offline_map({str(model)!r}, engine={ENGINE!r}).origin); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "cache\n"), run.stderr


@pytest.mark.vllm
def test_errors_come_through_and_nothing_is_cached(model):
    with pytest.raises(ConfigError, match=r"vLLM 0\.\d+\.\d+ does not take .*no_such_argument"):
        offline_map(model, engine={"no_such_argument": 1})
    assert not list(map_cache.cache_directory().glob("*"))


@pytest.mark.vllm
def test_an_architecture_that_nobody_knows(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"architectures": ["NoSuchModel"], "model_type": "no_such_model"}')
    with pytest.raises(ConfigError, match="no_such_model"):
        offline_map(config)


@pytest.mark.vllm
def test_a_training_whose_sync_ignores_names_is_planned_without_them(model):
    """By the map of what it sends, and what vLLM then lacks is allowed as in the sync."""
    norm = {"ignore_names": ["model.norm.*"]}
    with pytest.raises(CoverageError):
        offline_map(model, engine=ENGINE, **norm)
    allowed = {**norm, "allow_incomplete": ["model.norm"]}
    found = offline_map(model, engine=ENGINE, **allowed)
    whole = offline_map(model, engine=ENGINE)
    assert {m.name for m in whole.metas} - {m.name for m in found.metas} == {"model.norm.weight"}
    assert found.layer_map.layers["model.norm"].expected_numel == 0
    again = offline_map(model, engine=ENGINE, **allowed)
    assert (again.origin, again.layer_map) == ("cache", found.layer_map)


def test_a_probe_that_takes_too_long_is_ended(model):
    with pytest.raises(CompatError, match="did not answer within 0 s"):
        offline_map(model, timeout_seconds=0.2)


@pytest.fixture
def broken_torch(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise RuntimeError('a broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def test_a_probe_that_dies_says_its_last_words(model, broken_torch):
    with pytest.raises(CompatError, match=r"exit status 1:(?s:.*)a broken installation"):
        offline_map(model)


def test_without_vllm_what_is_not_recorded_is_refused(model, monkeypatch):
    monkeypatch.setattr(offline, "installed_vllm", lambda: None)
    with pytest.raises(CompatError) as refused:
        offline_map(model, engine={"quantization": "fp8"})
    assert refused.value.missing == ("vllm",)
    config = json.loads((model / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(CompatError, match="quantization_config"):
        offline_map(model)


def test_from_the_cache_neither_torch_nor_vllm_is_imported(model):
    keep_recorded_maps()
    (model / "config.json").write_text(json.dumps(MODELS["dense"][0]))
    program = (
        "import sys; from qerl_sync.offline.layer_map import offline_map; "
        f"assert offline_map({str(model / 'config.json')!r}).origin == 'cache'; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"engine": {"pipeline_parallel_size": 2}}, ConfigError, "pipeline_parallel_size is 2"),
        ({"dtype": "float3"}, ConfigError, "unknown dtype 'float3'"),
        ({"engine": {"quantization": object()}}, ConfigError, "not plain values"),
    ],
)
def test_arguments_that_cannot_be_right(model, arguments, error, words):
    with pytest.raises(error, match=words):
        offline_map(model, **arguments)


def test_weights_without_a_config(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        offline_map(tmp_path)


def test_planned_in_the_dtypes_that_transformers_loads(tmp_path):
    """A checkpoint that keeps some tensors in float32 that loading casts to bf16, and some in bf16
    that loading keeps in float32."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from qerl_sync import HFSource
    from qerl_sync.offline.program import trainer_model

    config = transformers.Dots1Config(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=48,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    widened = {n: t.float() if n.endswith("norm.weight") else t for n, t in stored.items()}
    save_file(widened, tmp_path / "model.safetensors", {"format": "pt"})

    read = read_checkpoint(tmp_path)
    sent = HFSource(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)).metadata()
    built = trainer_model(str(tmp_path), read.dtype, trust=False)()
    assert read.held_against(HFSource(built).metadata()).metas == sent
    (wide,) = [meta for meta in sent if meta.dtype != "bfloat16"]
    assert wide == ParamMeta("model.layers.1.mlp.gate.e_score_correction_bias", "float32", (4,))
    assert {meta.dtype for meta in read.metas if meta.name != wide.name} != {"bfloat16"}


def test_a_checkpoint_is_planned_in_the_dtype_of_its_config_unless_told(tmp_path):
    import torch
    import transformers

    from qerl_sync import HFSource
    from qerl_sync.offline.program import trainer_model

    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"](), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)

    def planned(told=None):
        read = read_checkpoint(tmp_path)
        built = trainer_model(str(tmp_path), told or read.dtype, trust=False)()
        return read.held_against(HFSource(built).metadata()).metas

    found = planned()
    assert {meta.dtype for meta in found} == {"bfloat16"}
    assert [m.name for m in found] == [name for name, _ in model.named_parameters()]
    assert sorted(found, key=lambda m: m.name) == read_checkpoint(tmp_path).metas
    assert sum(m.nbytes for m in planned("float32")) == 2 * sum(m.nbytes for m in found)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"dtype": "float16"}))
    assert {meta.dtype for meta in planned()} == {"float16"}


def test_a_prefix_is_planned_for_where_the_files_have_it(tmp_path):
    """LLaVA's on the hub have `vision_model` in names; transformers writes it back if it was there.
    vLLM takes no others."""
    import transformers
    from safetensors.torch import load_file, save_file

    from qerl_sync import HFSource
    from qerl_sync.offline.program import possible_streams, trainer_model

    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        vision_config={**small, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        text_config={**small, "num_attention_heads": 2, "vocab_size": 99, "model_type": "llama"},
    )
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")

    def planned():
        built = trainer_model(str(tmp_path), "float32", trust=False)()
        return [one.metas for one in possible_streams(built, read_checkpoint(tmp_path))]

    # Files without the prefix.
    assert planned() == [HFSource(model).metadata()]
    tower = "vision_tower."
    assert any(name.startswith(f"{tower}embeddings") for name in stored)
    prefixed = {name.replace(tower, f"{tower}vision_model."): t for name, t in stored.items()}
    save_file(prefixed, tmp_path / "model.safetensors", {"format": "pt"})
    # Files with it.
    loaded = type(model).from_pretrained(tmp_path)
    (found,) = planned()
    assert found == HFSource(loaded).metadata()
    assert {meta.name for meta in found} == set(prefixed)
    # Without files it may be either.
    (tmp_path / "model.safetensors").unlink()
    assert sorted(planned(), key=len) == [HFSource(model).metadata(), found]


# ----------------------------------------------------------------------------------- the cache


@pytest.fixture
def found():
    return replace(recorded()["dense"], note="a note", vllm_version="0.31.0")


@pytest.fixture
def counted(monkeypatch, found):
    """Probes that were run; they find a recorded map, at once."""
    requests = []

    def run_probe(request, timeout_seconds):
        requests.append(request)
        return found

    monkeypatch.setattr(offline, "run_probe", run_probe)
    monkeypatch.setattr(offline, "installed_vllm", lambda: "vllm 0.31.0")
    return requests


def test_a_map_survives_the_cache(found):
    file = map_cache.cache_file({"some": "key"})
    assert map_cache.load(file) is None
    map_cache.store(file, found)
    loaded = map_cache.load(file)
    assert (loaded.metas, loaded.layer_map) == (found.metas, found.layer_map)
    assert (loaded.origin, loaded.vllm_version, loaded.note) == ("cache", "0.31.0", "a note")
    taken = map_cache.cache_file({"another": "key"})
    taken.mkdir()
    map_cache.store(taken, found)  # no file can be put there
    assert {path.name for path in file.parent.iterdir()} == {file.name, taken.name}


def test_what_a_map_depends_on_is_in_its_key(model, counted, monkeypatch):
    variants = [
        {},
        {"engine": {"max_model_len": 64}},
        {"engine": {"quantization": "fp8"}},
        {"dtype": "float16"},
    ]
    for arguments in variants * 2:
        offline_map(model, **arguments)
    assert len(counted) == len(variants)
    monkeypatch.setattr(offline, "installed_vllm", lambda: "vllm 0.32.0")
    assert offline_map(model).origin == "probe"
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | {"rope_theta": 5}))
    assert offline_map(model).origin == "probe"


def test_no_cache(model, counted):
    for arguments in ({"cache": False}, {"engine": {"trust_remote_code": True}}):
        assert [offline_map(model, **arguments).origin for _ in range(2)] == ["probe"] * 2
    assert not map_cache.cache_directory().exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:-20],
        lambda raw: raw[:100] + bytes([raw[100] ^ 1]) + raw[101:],
        lambda raw: b"not gzip at all",
        lambda raw: gzip.compress(b'{"metas": 3}'),
    ],
)
def test_a_damaged_file_is_observed_anew_and_rewritten(model, counted, damage):
    offline_map(model)
    (file,) = map_cache.cache_directory().iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert offline_map(model).origin == "probe"
    assert offline_map(model).origin == "cache"
    assert len(counted) == 2


def test_a_cache_that_cannot_be_written_is_no_error(model, counted, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [offline_map(model).origin for _ in range(2)] == ["probe"] * 2
