"""The trainer's side of a session."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.options import FiniteCheck
from qerl_sync.plan.adapter import Adapter

if TYPE_CHECKING:
    import torch


class Source(ABC):
    """The trainer's weights, under Hugging Face checkpoint names.

    Example:
        class StateDictSource(Source):
            def metadata(self):
                return [ParamMeta(n, "bfloat16", tuple(t.shape)) for n, t in self.state.items()]
            def materialize(self, names):
                for name in names:
                    yield name, self.state[name]

    All methods are called on every trainer rank, in the same order: materialising may be a
    collective.

    Attributes:
        any_order: `materialize` serves names in any order. False: only in the order of `metadata`,
            each at most once between two calls of `metadata`.
        stable: what `materialize` yields stays as it is for as long as a receiver holds it, to the
            end of the sync: parameters themselves, or copies of which each has its own memory.
            Transports then send from there, instead of copying first.
        collective: `materialize` is a collective of all trainer ranks. Each rank then goes through
            all chunks, and waits for the others before each.
        checks_finite: `check_finite` can look before anything is materialised. False: the workers
            look at what arrives.
        stamps_content: `content_stamps` hashes what there is to send.
        lora: of a model that trains an adapter: how it travels (`mode`) and why so (`reason`).
        base_changed_by: what has changed the base when the adapter was made; empty: nothing.
    """

    any_order = True
    stable = False
    collective = False
    checks_finite = False
    stamps_content = False
    lora: Mapping[str, str] | None = None
    base_changed_by = ""

    @abstractmethod
    def metadata(self) -> list[ParamMeta]:
        """Return name, dtype and full shape of everything there is to send, in the source's own
        order.

        Transfers nothing. Called before every sync, so that a changed model is noticed.
        """

    def adapter(self) -> Adapter | None:
        """Return the LoRA adapter to be served beside the tensors of `metadata`; None: there is
        none.

        `materialize` and `check_finite` take its tensors' names too. Called after `metadata`.
        """
        return None

    def held_names(self) -> Collection[str] | None:
        """Return the names that this trainer rank holds; None: all. Some rank must hold each name.

        `metadata` describes the whole model all the same; only what is held is materialised.
        """
        return None

    def unchanging(self) -> Mapping[str, Hashable]:
        """Return a stamp for each tensor that need not be sent again while it keeps its values. The
        stamp differs as soon as they do (None: they never change).

        Called before each sync, after `metadata`. A name with the stamp that it had at the last
        committed sync is left out, unless its parent layer has something new to get.
        """
        return {}

    def content_stamps(self) -> Mapping[str, Hashable]:
        """Return a hash of each tensor's bytes. Names that are not in it always travel. For
        `sync.delta`, and only if `stamps_content`.

        Called before each sync, after `metadata`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no content_stamps")

    @property
    def device(self) -> torch.device | None:
        """Return the device that `materialize` yields tensors of; None: not known."""
        return None

    def storages(self) -> Mapping[str, Storage]:
        """Return the memory behind each tensor that `materialize` will yield, where it is known."""
        return {}

    def resident_bytes(self) -> int:
        """Return the part of `storages` that exists whether or not a sync runs.

        These are the weights themselves, if the receiver gets them by reference.
        """
        return 0

    def finite_check(self, wanted: bool) -> FiniteCheck:
        """Return which side looks for NaN in a sync, given `sync.check_finite`."""
        if not wanted:
            return "nobody"
        return "source" if self.checks_finite else "worker"

    def check_finite(self, names: Collection[str] | None = None, *, alone: bool = True) -> None:
        """Look for NaN and infinite values. Called only if `checks_finite`, and perhaps by another
        thread than the rest.

        Args:
            names: where to look; None: everywhere.
            alone: nothing else is computed meanwhile, so that all cores may look.

        Raises:
            CoverageError: naming the first bad tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} has checks_finite, and no check_finite")

    def end_chunk(self) -> None:  # noqa: B027  most sources gather nothing
        """Do what is left of the collectives of the last `materialize`.

        Called after each chunk; where the receiver failed in its middle, the other ranks wait in
        the collectives of the rest.
        """

    def end_sync(self) -> None:  # noqa: B027  most sources keep nothing open
        """Close what `materialize` has left open. Called after the last chunk, or one that failed,
        and before the commit."""

    def require_unwritten(self) -> None:  # noqa: B027  most sources cannot know
        """Raise CoverageError, with `tensor`, if a weight was written to since `metadata`.

        Called when all has been sent, before the commit: what was sent would be weights of two
        steps. What a fused optimizer writes on a GPU is not known (`verify.alias_guard.mark_of`).
        """

    @abstractmethod
    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield exactly `names`, in that order, as late as possible: a generator.

        The tensors are read-only and valid until the next one is asked for or, where the receiver
        keeps them by reference, until the end of the chunk. See `stable`.
        """
