"""Read what a Hugging Face checkpoint holds and in which order vLLM reads it, from headers alone.

Order of the files: vLLM's loaders sort the shards by name, with numbers as numbers
(`_natural_sort_key` in vLLM's model_loader/weight_utils.py), after leaving out files that the
index does not name.

Order within a file, three answers (safetensors 0.8, fastsafetensors 0.5, vLLM 0.31):

- vLLM's default loader asks `safe_open(...).keys()`, which are sorted by name whatever the header
  says. `Checkpoint.names` is this order.
- fastsafetensors sorts the header by data offset (`SafeTensorsMetadata`), and so does safetensors'
  own `load_file`. With one process that is `Checkpoint.names_by_offset`; with N tensor-parallel
  ranks it takes N files at a time, in the same order.
- Multi-threaded loading yields whole files in the order in which they happen to be ready.

safetensors writes the data sorted by alignment (large dtypes first), then by name: the orders by
name and by offset are the same for a checkpoint of one dtype that it wrote.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from qerl_sync.errors import FileError
from qerl_sync.meta import DTYPE_BITS, ParamMeta

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, or as much of it as there is.

    Attributes:
        path: what was asked for.
        config: the content of its `config.json`; None without one.
        shards: its files in the order in which vLLM reads them, each with its tensors' names in
            the order of vLLM's default loader. Empty without weights.
        metas: the tensors in that order; None if only the index is there, or nothing.
        names_by_offset: all names, shard by shard, in the order of the bytes; None as `metas`.
    """

    path: Path
    config: dict[str, Any] | None
    shards: list[tuple[str, list[str]]]
    metas: list[ParamMeta] | None
    names_by_offset: list[str] | None

    @property
    def names(self) -> list[str]:
        """Return all names in the order of vLLM's default loader."""
        return [name for _, names in self.shards for name in names]

    @property
    def directory(self) -> Path | None:
        """Return the directory whose `config.json` this is; None for another file name."""
        if self.path.is_dir():
            return self.path
        is_config = not self.shards and self.path.name != "config.json"
        return None if is_config else self.path.parent

    @property
    def dtype(self) -> str | None:
        """Return the dtype in which transformers loads this by default; None: torch's default.

        It is the dtype of the config, else that of the first floating-point tensor in the files.
        """
        config = self.config or {}
        named = config.get("dtype") or config.get("torch_dtype")
        floating = (meta.dtype for meta in self.metas or () if "float" in meta.dtype)
        return str(named) if named else next(floating, None)

    def held_against(self, metas: Sequence[ParamMeta]) -> Expected:
        """Return `metas`, which a trainer of this model would send, as far as the files agree.

        Where the files keep as one what a trainer sends in parts (all experts of a block), the
        tensor of the files stands in their place. Dtypes are those of `metas`: loading casts what
        the files keep in another one.

        Raises:
            ConfigError: a tensor is not in the files, or has another shape there.
        """
        if not self.shards:
            return Expected(list(metas), [], [])
        names = set(self.names)
        stored = {meta.name: meta for meta in self.metas or ()}
        # For each missing tensor the stored ones of the module that it is a part of, provided that
        # these have exactly the elements of all that is missing in it; else nothing at all.
        known = {meta.name for meta in metas}
        wholes: dict[str, list[ParamMeta]] = defaultdict(list)
        for meta in stored.values():
            if meta.name not in known:
                wholes[meta.name.rpartition(".")[0]].append(meta)
        parts: dict[str, list[ParamMeta]] = defaultdict(list)
        for meta in metas:
            if meta.name not in names:
                module = meta.name
                while module and module not in wholes:
                    module = module.rpartition(".")[0]
                parts[module].append(meta)
        fused: dict[str, list[ParamMeta]] = {}
        if "" not in parts and all(
            sum(meta.numel for meta in wholes[module]) == sum(meta.numel for meta in lost)
            for module, lost in parts.items()
        ):
            fused = {meta.name: wholes[module] for module, lost in parts.items() for meta in lost}
        kept: dict[str, ParamMeta] = {}
        for meta in metas:
            if meta.name in fused:
                kept |= {w.name: replace(w, dtype=meta.dtype) for w in fused[meta.name]}
                continue
            if meta.name not in names:
                raise FileError(
                    f"{self.path} has no {meta.name!r}, which its config.json asks for; is the "
                    "index truncated, or the config.json that of another model?",
                    path=str(self.path),
                    tensor=meta.name,
                )
            found = stored.get(meta.name, meta)
            if found.shape != meta.shape:
                raise FileError(
                    f"{self.path}: {meta.name!r} is {list(found.shape)}, by the config.json it "
                    f"should be {list(meta.shape)}; is it that of another model?",
                    path=str(self.path),
                    tensor=meta.name,
                    expected=meta.shape,
                    got=found.shape,
                )
            kept[meta.name] = meta
        used = dict.fromkeys(
            whole.name for stored_parts in fused.values() for whole in stored_parts
        )
        return Expected(list(kept.values()), sorted(names - kept.keys()), list(used))


class Expected(NamedTuple):
    """A trainer's tensors, the names in a checkpoint that are none of them, and the names of those
    that it keeps as one where a trainer sends parts."""

    metas: list[ParamMeta]
    surplus: list[str]
    fused: list[str]

    @property
    def note(self) -> str:
        """Describe the differences, in sentences; empty without any."""
        notes = []
        if self.surplus:
            notes.append(
                f"{len(self.surplus)} tensors of the checkpoint are not parameters of the "
                f"trainer's model and are left out: {_some(self.surplus)}."
            )
        if self.fused:
            notes.append(
                f"{len(self.fused)} tensors are planned for as the checkpoint keeps them, a "
                f"trainer sends them in parts: {_some(self.fused)}."
            )
        return " ".join(notes)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a model directory, a `config.json`, a safetensors index or a `.safetensors` file.

    No weights are read. A bare `config.json` stands for itself: files beside it are not looked at.

    Raises:
        ConfigError: there is no such thing, a file is truncated or malformed, or the index and the
            files contradict each other.
    """
    path = Path(path)
    if path.is_dir():
        _refuse_adapter(path)
        index = path / INDEX
        if index.is_file():
            return _read_index(path, index, read_json(index))
        # Mistral's own format lies beside the Hugging Face one and has names of its own.
        files = [f for f in path.glob("*.safetensors") if not f.name.startswith("consolidated")]
        config = _config_beside(index)
        if config is None and not files:
            raise FileError(
                f"{str(path)!r} has neither a config.json nor .safetensors files", path=str(path)
            )
        return _checkpoint(path, config, _in_reading_order(files))
    if not path.is_file():
        raise FileError(
            f"there is no {str(path)!r}; give a model directory, a config.json, a safetensors "
            "index or a .safetensors file",
            path=str(path),
        )
    if path.suffix == ".safetensors":
        return _checkpoint(path, _config_beside(path), [path])
    if path.suffix != ".json":
        raise FileError(
            f"{str(path)!r} is neither a .json nor a .safetensors file; other formats are not read",
            path=str(path),
        )
    content = read_json(path)
    if "weight_map" in content or path.name.endswith(".index.json"):
        return _read_index(path, path, content)
    return Checkpoint(path, content, shards=[], metas=None, names_by_offset=None)


def require_model_directory(path: Path) -> None:
    """Check that a model can be loaded from this directory, as far as headers show.

    Raises:
        FileError: it holds something else, or a file in it is damaged.
    """
    _refuse_adapter(path)
    if not (path / "config.json").is_file():
        raise FileError(
            f"{path.absolute()} has no config.json, so it holds no model; name a directory that "
            "save_pretrained has written",
            path=str(path),
        )
    require_whole_files(path)


def require_whole_files(path: Path) -> None:
    """Check the configuration and the headers of the weights in a directory, as far as they are
    there. Raises FileError for one that is damaged."""
    for file in (path / "config.json", path / INDEX):
        if file.is_file():
            read_json(file)
    for file in path.glob("*.safetensors"):
        _read_header(file)


def _refuse_adapter(path: Path) -> None:
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise FileError(
            f"{path.absolute()} is a PEFT adapter, not a model; merge it into its base model "
            "(AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...)"
            ") and name that directory",
            path=str(path),
        )


def _read_index(path: Path, index: Path, content: dict[str, Any]) -> Checkpoint:
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{index} has no weight_map; is it truncated?", path=str(index))
    tensors_of: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise FileError(
                f"{index}: the file of {name!r} is {file!r}, not a file name",
                path=str(index),
                tensor=name,
            )
        tensors_of.setdefault(file, set()).add(name)
    for file in tensors_of:
        numbered = re.search(r"-of-(\d+)", file)
        if numbered and int(numbered[1]) != len(tensors_of):
            raise FileError(
                f"{index} names {len(tensors_of)} files, but {file} is one of "
                f"{int(numbered[1])}; the index is truncated or mixed from two checkpoints",
                path=str(index),
            )
    files = _in_reading_order(index.parent / name for name in tensors_of)
    missing = [file.name for file in files if not file.is_file()]
    config = _config_beside(index)
    if len(missing) == len(files):  # the index alone: names, and no shapes
        shards = [(file.name, sorted(tensors_of[file.name])) for file in files]
        return Checkpoint(path, config, shards, metas=None, names_by_offset=None)
    if missing:
        raise FileError(
            f"{index}: {len(missing)} of its {len(files)} files are missing, the first is "
            f"{missing[0]}; download them all, or none",
            path=str(index.parent / missing[0]),
        )
    found = _checkpoint(path, config, files)
    for file, held in found.shards:
        for name in sorted(tensors_of[file].symmetric_difference(held)):
            only = "file" if name in held else "index"
            raise FileError(
                f"{index} and {file} contradict each other: {name!r} is in the {only} only",
                path=str(index),
                tensor=name,
            )
    return found


def _checkpoint(path: Path, config: dict[str, Any] | None, files: list[Path]) -> Checkpoint:
    headers = {file.name: _read_header(file) for file in files}
    seen: dict[str, str] = {}
    for file, header in headers.items():
        for meta in header:
            other = seen.setdefault(meta.name, file)
            if other != file:
                raise FileError(
                    f"{path}: {meta.name!r} is in {other} and in {file}",
                    path=str(path),
                    tensor=meta.name,
                )
    by_name = {file: sorted(header, key=lambda meta: meta.name) for file, header in headers.items()}
    return Checkpoint(
        path=path,
        config=config,
        shards=[(file, [meta.name for meta in metas]) for file, metas in by_name.items()],
        metas=[meta for metas in by_name.values() for meta in metas] if files else None,
        names_by_offset=[m.name for h in headers.values() for m in h] if files else None,
    )


def _in_reading_order(files: Iterable[Path]) -> list[Path]:
    """Sort by name, "shard-10" after "shard-9"."""

    def natural(file: Path) -> list[str | int]:
        return [int(s) if s.isdigit() else s for s in re.split(r"(\d+)", file.name)]

    return sorted(files, key=natural)


def _config_beside(file: Path) -> dict[str, Any] | None:
    config = file.parent / "config.json"
    return read_json(config) if config.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises FileError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise FileError(f"there is no file {path.absolute()}", path=str(path)) from exc
    except (OSError, ValueError) as exc:
        raise FileError(
            f"{path} is not readable as JSON ({exc}); is it truncated? Fetch or save it anew",
            path=str(path),
        ) from exc
    if not isinstance(content, dict):
        raise FileError(
            f"{path} holds a JSON {type(content).__name__}, not an object; fetch or save it anew",
            path=str(path),
        )
    return content


def _read_header(file: Path) -> list[ParamMeta]:
    """Return a file's tensors, in the order of their bytes."""
    try:
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            start = f.read(8)
            header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            raw = f.read(min(header_bytes, MAX_HEADER_BYTES))
    except OSError as exc:
        raise FileError(f"{file} cannot be read: {exc}", path=str(file)) from exc
    if start == b"version ":
        raise FileError(f"{file} is a git-lfs pointer; fetch the file itself", path=str(file))
    if not 2 <= header_bytes == len(raw):
        raise FileError(
            f"{file} has no safetensors header; it is truncated or of another kind: fetch or save "
            "it anew",
            path=str(file),
        )
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"])
        metas = [_meta(file, name, entry) for name, entry in entries]
        data_bytes = max((entry["data_offsets"][1] for _, entry in entries), default=0)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as exc:
        raise FileError(
            f"{file}: the safetensors header is malformed ({exc!r}); fetch or save it anew",
            path=str(file),
        ) from exc
    if size != 8 + header_bytes + data_bytes:
        raise FileError(
            f"{file} has {size:,} bytes, its header promises {8 + header_bytes + data_bytes:,}; "
            "it is truncated or still being written: fetch or save it anew",
            path=str(file),
        )
    return metas


def _meta(file: Path, name: str, entry: dict[str, Any]) -> ParamMeta:
    if entry["dtype"] not in DTYPES:
        raise FileError(
            f"{file}: {name!r} is of dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}",
            path=str(file),
            tensor=name,
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    start, end = entry["data_offsets"]
    if end - start != math.prod(shape) * DTYPE_BITS[dtype] // 8:
        raise ValueError(f"{name!r} of shape {list(shape)} does not fill its {end - start} bytes")
    return ParamMeta(name, dtype, shape)
