"""Reading checkpoints from headers: the orders of their files, and what is refused."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.errors import raises

from qerl_sync.errors import FileError
from qerl_sync.meta import ParamMeta
from qerl_sync.plan.checkpoint import DTYPES, INDEX, read_checkpoint

CONFIG = {"architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def directory(tmp_path):
    """Eleven shards, mixed dtypes, names that say nothing about the order of the bytes."""
    weight_map = {}
    for shard in range(1, 12):
        tensors = {
            f"z{shard}.weight": torch.zeros(3, dtype=torch.float32),
            f"b{shard}.weight": torch.zeros(2, 2, dtype=torch.bfloat16),
            f"a{shard}.scale": torch.zeros(1, dtype=torch.int8),
        }
        file = f"model-{shard}-of-11.safetensors"
        save_file(tensors, tmp_path / file)
        weight_map |= dict.fromkeys(tensors, file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def write_safetensors(path, header, data_bytes=0):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data_bytes))
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_shards_in_natural_order_and_names_as_safetensors_gives_them(directory):
    read = read_checkpoint(directory)
    files = [directory / f"model-{shard}-of-11.safetensors" for shard in range(1, 12)]
    assert [file for file, _ in read.shards] == [file.name for file in files]
    names, by_offset = [], []
    for file in files:
        with safe_open(file, framework="pt") as f:
            names += f.keys()
            by_offset += f.offset_keys()
    assert read.names == [meta.name for meta in read.metas] == names
    assert read.names_by_offset == by_offset != names
    assert read.config == CONFIG


@pytest.mark.vllm
def test_the_order_is_that_of_vllms_default_loader(directory):
    from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

    files = sorted(str(file) for file in directory.glob("*.safetensors"))
    loaded = [
        ParamMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in safetensors_weights_iterator(files, use_tqdm_on_load=False)
    ]
    assert read_checkpoint(directory).metas == loaded


def test_every_dtype_of_safetensors(tmp_path):
    for theirs, ours in DTYPES.items():
        dtype = getattr(torch, ours)
        save_file({"t": torch.zeros(2, dtype=dtype)}, tmp_path / "t.safetensors")
        (meta,) = read_checkpoint(tmp_path / "t.safetensors").metas
        assert (meta.dtype, meta.nbytes) == (ours, 2 * dtype.itemsize), theirs


def test_all_ways_to_name_it(directory):
    whole = read_checkpoint(directory)
    by_index = read_checkpoint(directory / INDEX)
    assert (by_index.metas, by_index.config) == (whole.metas, CONFIG)
    one = read_checkpoint(directory / "model-2-of-11.safetensors")
    assert (len(one.metas), one.config) == (3, CONFIG)
    bare = read_checkpoint(directory / "config.json")
    assert (bare.config, bare.shards, bare.metas) == (CONFIG, [], None)
    for read in (whole, by_index, one, bare):
        assert read.directory == directory


def test_an_index_without_its_files_gives_names(directory):
    for file in directory.glob("*.safetensors"):
        file.unlink()
    read = read_checkpoint(directory)
    assert (read.metas, read.names_by_offset) == (None, None)
    assert read.shards[1] == (
        "model-2-of-11.safetensors",
        ["a2.scale", "b2.weight", "z2.weight"],
    )


def test_files_that_the_index_does_not_name_are_left_out(directory):
    save_file({"other": torch.zeros(1)}, directory / "extra.safetensors")
    assert "other" not in read_checkpoint(directory).names


def test_mistrals_own_format_is_left_out(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert read_checkpoint(tmp_path).shards == [("model.safetensors", ["a"])]


def _index(content):
    def damage(directory):
        path = directory / INDEX
        path.write_text(content if isinstance(content, str) else json.dumps(content))

    return damage


def _drop_from_index(directory):
    content = json.loads((directory / INDEX).read_text())
    del content["weight_map"]["b3.weight"]
    (directory / INDEX).write_text(json.dumps(content))


def _drop_shards_from_index(directory):
    content = json.loads((directory / INDEX).read_text())
    kept = {k: v for k, v in content["weight_map"].items() if v.startswith("model-1")}
    (directory / INDEX).write_text(json.dumps({"weight_map": kept}))


def _truncate(directory):
    file = directory / "model-4-of-11.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def _remove(directory):
    (directory / "model-4-of-11.safetensors").unlink()


def _pointer(directory):
    file = directory / "model-4-of-11.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


# What is done to the checkpoint; the file, or the tensor, that the error names.
FOURTH = "model-4-of-11.safetensors"
DAMAGED = {
    "index is half there": (_index('{"weight_map": {"a": "mo'), INDEX, None),
    "index is empty": (_index({"weight_map": {}}), INDEX, None),
    "index is a list": (_index([1]), INDEX, None),
    "index leads elsewhere": (_index({"weight_map": {"a": "../b"}}), INDEX, "a"),
    "index lacks a name": (_drop_from_index, INDEX, "b3.weight"),
    "index lacks shards": (_drop_shards_from_index, INDEX, None),
    "shard is cut off": (_truncate, FOURTH, None),
    "shard is not there": (_remove, FOURTH, None),
    "shard is a pointer": (_pointer, FOURTH, None),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_checkpoints_are_refused(directory, case):
    damage, file, tensor = DAMAGED[case]
    damage(directory)
    with raises(FileError, path=str(directory / file), tensor=tensor):
        read_checkpoint(directory)


HEADERS = {
    "nothing": (b"", 0),
    "no JSON": (b"{nonsense", 0),
    "a list": (b"[1, 2]", 0),
    "no dtype": ({"t": {"shape": [2], "data_offsets": [0, 8]}}, 8),
    "new dtype": ({"t": entry(dtype="F1")}, 8),
    "wrong size": ({"t": entry(shape=(3,))}, 8),
    "too little data": ({"t": entry()}, 4),
    "too much data": ({"t": entry()}, 12),
}


@pytest.mark.parametrize("case", HEADERS)
def test_malformed_headers_are_refused(tmp_path, case):
    header, data_bytes = HEADERS[case]
    file = write_safetensors(tmp_path / "t.safetensors", header, data_bytes)
    with raises(FileError, path=str(file), tensor="t" if case == "new dtype" else None):
        read_checkpoint(file)


def test_a_header_that_claims_more_than_the_file_has(tmp_path):
    file = tmp_path / "t.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with raises(FileError, path=str(file)):
        read_checkpoint(file)


def test_a_name_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        write_safetensors(tmp_path / f"{name}.safetensors", {"t": entry()}, 8)
    with raises(FileError, path=str(tmp_path), tensor="t"):
        read_checkpoint(tmp_path)


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"")
    for name in ("nothing", "empty", "model.bin"):
        with raises(FileError, path=str(tmp_path / name)):
            read_checkpoint(tmp_path / name)


TRAINER = [ParamMeta("a", "bfloat16", (2,)), ParamMeta("b", "bfloat16", (2,))]


def test_a_trainers_tensors_are_cast_as_they_are_loaded(tmp_path):
    header = {"a": entry(), "b": entry(offsets=(8, 16)), "mtp": entry(offsets=(16, 24))}
    read = read_checkpoint(write_safetensors(tmp_path / "t.safetensors", header, 24))
    expected = read.held_against(TRAINER)
    assert expected.metas == TRAINER  # the files have both in float32
    assert "1 tensors of the checkpoint" in expected.note
    assert "mtp" in expected.note


def test_a_checkpoint_is_loaded_in_the_dtype_of_its_config_else_of_its_files(tmp_path):
    header = {"a": entry("BF16", (4,)), "b": entry(offsets=(8, 16))}
    path = write_safetensors(tmp_path / "t.safetensors", header, 16)
    assert read_checkpoint(path).dtype == "bfloat16"
    for field in ("dtype", "torch_dtype"):
        (tmp_path / "config.json").write_text(json.dumps({field: "float16"}))
        assert read_checkpoint(path).dtype == "float16"
    (tmp_path / "config.json").write_text("{}")
    assert read_checkpoint(tmp_path / "config.json").dtype is None


def test_experts_that_the_files_keep_as_one_stand_for_their_parts(tmp_path):
    parts = [ParamMeta(f"mlp.experts.{i}.up_proj.weight", "bfloat16", (2,)) for i in range(2)]
    trainer = [TRAINER[0], *parts, TRAINER[1]]
    header = {
        "a": entry(),
        "b": entry(offsets=(8, 16)),
        "mlp.experts.up_proj": entry(shape=(2, 2), offsets=(16, 32)),
    }
    read = read_checkpoint(write_safetensors(tmp_path / "t.safetensors", header, 32))
    expected = read.held_against(trainer)
    assert [meta.name for meta in expected.metas] == ["a", "mlp.experts.up_proj", "b"]
    assert expected.metas[1].shape == (2, 2)
    assert expected.metas[1].dtype == "bfloat16"
    assert expected.surplus == []
    assert "planned for as the checkpoint keeps them" in expected.note
    with raises(FileError, tensor="mlp.experts.0.up_proj.weight"):
        read.held_against([*trainer, ParamMeta("mlp.experts.2.up_proj.weight", "bfloat16", (2,))])


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    short = read_checkpoint(write_safetensors(tmp_path / "t.safetensors", {"a": entry()}, 8))
    with raises(FileError, tensor="b"):
        short.held_against(TRAINER)
    header = {"a": entry(), "b": entry(shape=(1, 2), offsets=(8, 16))}
    other = read_checkpoint(write_safetensors(tmp_path / "u.safetensors", header, 16))
    with raises(FileError, tensor="b", expected=(2,), got=(1, 2)):
        other.held_against(TRAINER)
    renamed = {"a": entry(), "c": entry(offsets=(8, 16))}
    other = read_checkpoint(write_safetensors(tmp_path / "v.safetensors", renamed, 16))
    with raises(FileError, tensor="b"):
        other.held_against(TRAINER)
