"""Detect what changed from one sync to the next, from a few thousand elements of each tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xxhash

from qerl_sync.verify.parts import part_here

# Of a larger tensor, runs of elements at even distances: 4,096 in all, in few pages of memory. A
# step at usual learning rates changes one to three in a hundred bfloat16 elements.
RUNS, RUN = 64, 64
# So many syncs in a row a parameter must have changed on the trainer and not here, before that is
# a finding where other tensors do change: rounding and rare tokens make it happen once.
PATIENCE = 3

Named = Iterable[tuple[str, torch.Tensor]]

# Wrappers' parts of a parameter's name: PEFT's, torch.compile's, FSDP's, DDP's.
_WRAPPERS = re.compile(
    r"^(base_model\.model\.|module\.)+|(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module"
    r"|base_layer)\."
)
_ADAPTER = re.compile(r"\.lora_\w+\..*$")
_ADAPTERS_NAME = re.compile(r"\.(lora_\w+)\.[^.]+(\.weight)?$")
_COPIES = re.compile(r"\.(modules_to_save\.[^.]+|original_module)\.")


@dataclass(frozen=True)
class Changes:
    """The changes of one sync against the previous one.

    Attributes:
        num_changed: tensors sent that differ from those of the sync before; None: there was none.
        undelivered: names that changed on the trainer and did not travel, if that is a finding.
        finding: says so, with the next step; None: all is well.
    """

    num_changed: int | None
    undelivered: tuple[str, ...] = ()
    finding: str | None = None


class ChangeWatch:
    """Compare what is sent with what was sent before, and with what the trainer changed.

    Call `begin`, `see` for each tensor that is sent, then `conclude`, which makes the sync the one
    that the next is compared with. Do not conclude a sync that failed.

    Args:
        trained: yields the parameters that the optimizer steps, by the trainer's own names and
            adapters included; None: not known, then only a sync in which nothing at all changed is
            a finding.
    """

    def __init__(self, trained: Callable[[], Named] | None = None) -> None:
        self._trained_now = trained
        self._sent: dict[str, int] = {}
        self._trained: dict[str, int] = {}
        self._waiting: dict[str, int] = {}
        self._still = 0
        self._step: int | None = None
        self._dtypes: dict[str, torch.dtype] = {}
        self.begin()

    def begin(self, unsent: Collection[str] = ()) -> None:
        """Begin a sync that leaves out `unsent`, which stay as they were sent before."""
        self._seen = {name: self._sent[name] for name in unsent if name in self._sent}
        self._dtypes = {name: self._dtypes[name] for name in unsent if name in self._dtypes}
        self._by_memory: dict[tuple[int, torch.dtype, torch.Size], int] = {}

    def see(self, name: str, tensor: torch.Tensor) -> None:
        found = sample_hash(tensor)
        self._seen[name], self._dtypes[name] = found, tensor.dtype
        if self._trained_now is not None:
            self._by_memory[_memory(tensor)] = found

    def conclude(self, step: int) -> Changes:
        """Judge this sync, if the trainer's step has moved since the last one."""
        sent, trained = self._seen, {}
        for name, tensor in self._trained_now() if self._trained_now is not None else ():
            if isinstance(tensor, torch.nn.Parameter) and not tensor.requires_grad:
                continue  # of a PEFT model nearly all, and no optimizer steps it
            # Most parameters are sent as they are, and were hashed on their way.
            found = self._by_memory.get(_memory(tensor))
            if found is None:
                # Rounded as for sending: changes that rounding hides need not be sent.
                found = sample_hash(tensor, self._dtypes.get(destination(name), tensor.dtype))
            trained[name] = found
        changed = {name for name, found in sent.items() if self._sent.get(name) != found}
        moved = [n for n, f in trained.items() if self._trained.get(n, f) != f]
        judged = self._step is not None and step > self._step
        result = Changes(len(changed) if self._sent else None)
        if judged and self._sent:
            result = self._judge(step, changed, moved)
        self._sent, self._trained, self._step = sent, trained, step
        self._by_memory.clear()  # another tensor may have that address in the next sync
        return result

    def _judge(self, step: int, changed: set[str], moved: list[str]) -> Changes:
        self._still = 0 if changed or moved else self._still + 1
        if not changed and not moved and self._trained_now is not None:
            # One step with a learning rate or gradients of zero is nothing to speak of.
            return Changes(0, (), _STANDS_STILL if self._still == PATIENCE else None)
        if not changed:
            finding = (
                f"none of the {len(self._seen):,} tensors sent has changed since the sync of step "
                f"{self._step}, and the trainer is at step {step}. "
            )
            if moved:
                finding += f"{some_of(moved)} changed on the trainer and did not travel. {_ADVICE}"
            else:
                finding += (
                    "Either that step changed nothing (a learning rate or gradients of zero), or "
                    f"what it changed is not what is sent. {_ADVICE}"
                )
            return Changes(0, tuple(moved), finding)
        delivered = _Delivery(self._seen, changed)
        self._waiting = {n: self._waiting.get(n, 0) + 1 for n in moved if n not in delivered}
        late = tuple(name for name, count in self._waiting.items() if count >= PATIENCE)
        if not late:
            return Changes(len(changed))
        finding = (
            f"{some_of(list(late))} changed on the trainer in each of the last {PATIENCE} steps "
            f"that were synced, and what was sent of it did not. {_ADVICE}"
        )
        return Changes(len(changed), late, finding)


_ADVICE = (
    "Is the source made from the model that the optimizer steps, and are adapters merged into "
    "what it yields? sync.on_unchanged: ignore takes it as meant"
)
_STANDS_STILL = (
    f"in the last {PATIENCE} syncs neither what was sent has changed nor what the trainer steps, "
    "although its step has moved: the model is frozen, its learning rate or its gradients are "
    "zero, or the optimizer steps another one. sync.on_unchanged: ignore takes it as meant"
)


def sample_hash(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    """Hash the bits of evenly spread elements, as `dtype`, or of all in small tensors."""
    plain = part_here(tensor)
    here = plain.device.type == "cpu" and plain.is_contiguous()
    if here and dtype in (None, plain.dtype):
        return _sample_hash_here(plain)
    picked = _sample(plain)
    if dtype is not None:
        picked = picked.to(dtype)
    raw = picked.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_64_intdigest(raw.data)


def _sample_hash_here(tensor: torch.Tensor) -> int:
    """Return the same, of a contiguous tensor in host memory: by slices of its bytes, as torch's
    calls cost more than the hash, and each sync makes them for each tensor."""
    raw = tensor.view(-1).view(torch.uint8).numpy()
    if tensor.numel() <= RUNS * RUN:
        return xxhash.xxh3_64_intdigest(raw.data)
    run, step = RUN * tensor.itemsize, _step(tensor) * tensor.itemsize
    last = (RUNS - 1) * step
    digest = xxhash.xxh3_64(np.ascontiguousarray(raw[:last].reshape(RUNS - 1, step)[:, :run]).data)
    digest.update(raw[last : last + run].data)
    return digest.intdigest()


def destination(name: str) -> str:
    """Return the parameter's name without the additions of wrappers and adapters."""
    plain = _COPIES.sub(".", _WRAPPERS.sub("", name))
    return _ADAPTER.sub(".weight", plain)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() <= RUNS * RUN:
        return tensor
    step = _step(tensor)
    if tensor.is_contiguous():
        return tensor.as_strided((RUNS, RUN), (step, 1), tensor.storage_offset())
    places = (torch.arange(RUNS)[:, None] * step + torch.arange(RUN)).view(-1)
    return tensor[torch.unravel_index(places.to(tensor.device), tensor.shape)]


def _step(tensor: torch.Tensor) -> int:
    """Return how many elements lie from the beginning of one run to that of the next."""
    return (tensor.numel() - RUN) // (RUNS - 1)


def _memory(tensor: torch.Tensor) -> tuple[int, torch.dtype, torch.Size]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape


class _Delivery:
    """Decide which of the trainer's changes changed what was sent."""

    def __init__(self, sent: Iterable[str], changed: set[str]) -> None:
        self._sent, self._changed = set(sent), changed

    @cached_property
    def _sent_modules(self) -> set[str]:
        return {module for name in self._sent for module in _modules(name)}

    @cached_property
    def _changed_modules(self) -> set[str]:
        return {module for name in self._changed for module in _modules(name)}

    def __contains__(self, name: str) -> bool:
        """Return whether the parameter's change was sent.

        If the checkpoint has it under another name (fused or renamed modules), a change of anything
        in the innermost module that both share counts.
        """
        factor = _ADAPTERS_NAME.sub(r".\1\2", _WRAPPERS.sub("", name))
        if factor in self._sent:  # the adapter travels itself
            return factor in self._changed
        wanted = destination(name)
        if wanted in self._sent:
            return wanted in self._changed
        common = next((m for m in _modules(wanted) if m in self._sent_modules), "")
        return not common or common in self._changed_modules


def _modules(name: str) -> Iterator[str]:
    """Return the modules around a name, innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def some_of(names: list[str]) -> str:
    """Return the first three names, for a person, and how many there are besides."""
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"
