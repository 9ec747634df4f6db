"""Check heads that share their parameter with the embeddings, where the trainer sends both."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qerl_sync.errors import CoverageError
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.verify.checksum import checksum


class TiedCheck:
    """Compare what arrives for a head with what arrives for the parameter that it shares.

    vLLM's loaders drop a tied head's own tensor. It is superfluous where the trainer's is tied too,
    and names it twice. Where the trainer has untied it, or trains a copy of it, the engine would
    compute with the embeddings instead, and no count of elements shows it.

    Args:
        tied: see `refresh.tied_parameters`.
        known: the checksums of the version that this sync builds on, by checkpoint name.

    Attributes:
        checksums: of what has arrived, and of the rest of `known`.
    """

    def __init__(
        self,
        layer_map: LayerMap,
        tied: Mapping[str, tuple[str, str]],
        known: Mapping[str, int],
    ) -> None:
        heads = {f"{path}.{place[1]}": place for path, place in tied.items()}
        landed = layer_map.contributions if heads.keys() & layer_map.contributions else {}
        names = {(one.parent_layer, one.parameter): n for n, got in landed.items() for one in got}
        self._pairs = {n: names[heads[n]] for n in landed if n in heads and heads[n] in names}
        self._names = {*self._pairs, *self._pairs.values()}
        self.checksums = {name: known[name] for name in self._names if name in known}

    def arrived(self, name: str, tensor: torch.Tensor) -> None:
        if name in self._names:
            self.checksums[name] = checksum(tensor)

    def conclude(self) -> None:
        """Raise CoverageError, with `tensor`, if a head differs from what it shares."""
        for head, shared in self._pairs.items():
            if self.checksums.get(head) != self.checksums.get(shared):
                raise CoverageError(
                    f"{head!r} and {shared!r} differ on the trainer, and are one parameter in the "
                    "engine, which takes the latter for both. Train them as one (tie_weights(), "
                    "no copy of the head in modules_to_save), or start the engine with "
                    "tie_word_embeddings false in its model's configuration",
                    tensor=head,
                )
