"""Orders by name, as the command line takes them: those of `sync.source_order`, and from files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from qerl_sync.errors import ConfigError
from qerl_sync.meta import ParamMeta, parse_bytes
from qerl_sync.plan.orders import Reorder, parse_order
from qerl_sync.plan.record import read_record

# The orders that depend on a checkpoint's files, and the names in each of them.
FILE_ORDERS = ("safetensors", "fastsafetensors")
Files = Mapping[str, Sequence[str]]

# The file size of `save_pretrained` for years, where a checkpoint has no files to look at.
USUAL_SHARD_BYTES = "5GB"


def resolve_order(text: str, *, files: Files | None = None) -> Reorder:
    """Return the order that `text` names.

    hf, alphabetical, size, optimizer, random:SEED, interleaved:N   as in `sync.source_order`
    safetensors                 the checkpoint's files, as vLLM's default loader reads them
    fastsafetensors             the same with `load_format: fastsafetensors`: by place in the file
    safetensors:SIZE            as if `save_pretrained` had cut the model into files of SIZE
    file:PATH                   the names in a text file, one a line; # begins a comment
    run:DIR                     the source's order in a recorded run

    Args:
        files: the names of the checkpoint's tensors in the order of each of `FILE_ORDERS`, as far
            as the checkpoint has files.

    Raises:
        ConfigError: no such order, or what it names cannot be read. The order itself raises it when
            the names do not fit the model.
    """
    kind, _, argument = text.partition(":")
    if kind in FILE_ORDERS and not argument:
        if not files or kind not in files:
            raise ConfigError(
                f"the order {text!r} needs the checkpoint's .safetensors files, and there are "
                f"none; try safetensors:{USUAL_SHARD_BYTES}, the order in which it would be saved"
            )
        return by_name(files[kind], "the checkpoint's files", strict=False)
    if kind == "safetensors":
        return as_saved(parse_bytes(argument))
    if kind == "file" and argument:
        try:
            lines = Path(argument).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"the order file {argument} cannot be read: {exc}") from exc
        stripped = (line.strip() for line in lines)
        names = [line for line in stripped if line and not line.startswith("#")]
        return by_name(names, argument)
    if kind == "run" and argument:
        return by_name(read_record(Path(argument)).source_names, argument)
    try:
        return parse_order(text)
    except ConfigError as exc:
        raise ConfigError(
            f"unknown order {text!r}; choose hf, safetensors, fastsafetensors, safetensors:SIZE, "
            "alphabetical, size, optimizer, random:SEED, interleaved:N, file:PATH or run:DIR"
        ) from exc


def default_orders(files: Files | None) -> list[str]:
    """Return the orders to look at when none is asked for."""
    known = files or {}
    stored = [kind for kind in FILE_ORDERS if kind in known]
    if len(stored) > 1 and known[stored[0]] == known[stored[1]]:
        stored.pop()
    stored = stored or [f"safetensors:{USUAL_SHARD_BYTES}"]
    return ["hf", *stored, "alphabetical", "size", "optimizer", "random:0", "interleaved:4"]


def by_name(names: Sequence[str], origin: str, *, strict: bool = True) -> Reorder:
    """Return an order: that of `names`.

    Args:
        origin: where the names come from, for errors.
        strict: names and model must be the same. Otherwise names that the model does not have are
            passed over, and tensors that are not named come last.
    """

    def order(metas: Sequence[ParamMeta]) -> list[ParamMeta]:
        by = {meta.name: meta for meta in metas}
        if strict:
            _refuse_other_names(names, by, origin)
        known = dict.fromkeys(name for name in names if name in by)
        rest = (name for name in by if name not in known)
        return [by[name] for name in (*known, *rest)]

    return order


def as_saved(shard_bytes: int) -> Reorder:
    """Return the order in which loaders read a checkpoint that `save_pretrained` wrote.

    It writes the model's order, cut into files of up to `shard_bytes`, and by name in each file. A
    larger tensor gets a file of its own, which comes before the one that was being filled.
    """

    def order(metas: Sequence[ParamMeta]) -> list[ParamMeta]:
        files: list[list[ParamMeta]] = []
        current: list[ParamMeta] = []
        filled = 0
        for meta in metas:
            if meta.nbytes > shard_bytes:
                files.append([meta])
                continue
            if filled + meta.nbytes > shard_bytes:
                files.append(current)
                current, filled = [], 0
            current.append(meta)
            filled += meta.nbytes
        files.append(current)
        return [meta for file in files for meta in sorted(file, key=lambda meta: meta.name)]

    return order


def _refuse_other_names(names: Sequence[str], model: dict[str, ParamMeta], origin: str) -> None:
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise ConfigError(
            f"{origin}: {doubled[0]!r} stands there more than once{_more(doubled)}; an order names "
            "each tensor once"
        )
    unknown = [name for name in names if name not in model]
    if unknown:
        close = get_close_matches(unknown[0], list(model)[:100_000], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{origin}: the model has no {unknown[0]!r}{_more(unknown)}{hint}")
    missing = sorted(model.keys() - set(names))
    if missing:
        raise ConfigError(
            f"{origin}: {missing[0]!r} is missing{_more(missing)}; an order names every tensor of "
            "the model"
        )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more names)" if len(names) > 1 else ""
