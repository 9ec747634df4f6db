"""Gaussian noise on the RMSNorm weights that rollout engines get (QeRL, arXiv 2510.11696).

The trainer's own weights are only read: each sync adds its noise to copies of them, on their way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qerl_sync.errors import ConfigError
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.layer_map import LayerMap
from qerl_sync.plan.noise_schedule import PRESETS, NoiseSchedule

if TYPE_CHECKING:
    from qerl_sync.config import NoiseConfig
    from qerl_sync.session import SyncReport

Named = Iterable[tuple[str, torch.Tensor]]


class RolloutNoise:
    """Add the noise of one sync to what a source yields. See `SyncConfig.noise`.

    Call `choose` when the stream is known, and `begin` before each sync. Every trainer rank, and
    every repetition of a failed sync, makes the same noise: it is a function of the seed, the
    weight version and the tensor's name.

    Attributes:
        num_steps: the steps of the run, by which the schedule goes; None: not known yet.
    """

    def __init__(self, config: NoiseConfig) -> None:
        start, end = PRESETS[config.preset] if config.preset else (0.0, 0.0)
        self._schedule = NoiseSchedule(
            config.sigma_start or start, config.sigma_end or end, config.intervals
        )
        self._config = config
        self._seed = config.seed or 0
        self.num_steps = config.steps
        self._chosen: dict[str, ParamMeta] = {}
        self._stage, self._sigma, self._version = 0, 0.0, 0
        self._dtype: torch.dtype | None = None
        self._left, self._numel = 0.0, 0

    def begin_run(self, num_steps: int, seed: int) -> None:
        """Take the run's steps and seed where the configuration has none.

        Raises:
            ConfigError: the schedule has more intervals than the run has steps; `intervals`,
                `steps`.
        """
        if self._config.seed is None:
            self._seed = seed
        if self._config.steps is None:
            if self._config.intervals > num_steps:
                raise ConfigError(
                    f"sync.noise.intervals is {self._config.intervals}, and the run has "
                    f"{num_steps} steps; each interval needs a step. Give fewer intervals",
                    intervals=self._config.intervals,
                    steps=num_steps,
                )
            self.num_steps = num_steps

    def choose(self, metas: Sequence[ParamMeta], layer_map: LayerMap) -> None:
        """Find the RMSNorm weights by their names and by the layers that they land in.

        Raises:
            ConfigError: `sync.noise.names` has a pattern without such a weight, or one for weights
                of other layers; `pattern`.
        """
        chosen: dict[str, ParamMeta] = {}
        for pattern in self._config.names:
            found = [meta for meta in metas if fnmatchcase(meta.name, pattern)]
            for meta in found:
                kinds = _kinds(layer_map, meta.name)
                if not kinds or not all("RMSNorm" in kind for kind in kinds):
                    raise ConfigError(
                        f"sync.noise.names: {pattern!r} means {meta.name!r}, which lands in "
                        f"{', '.join(sorted(kinds)) or 'no layer'}, and noise is for weights of "
                        "RMSNorm. Give patterns of those, or leave sync.noise out",
                        pattern=pattern,
                    )
            chosen |= {meta.name: meta for meta in found}
            # The default patterns are of norms that not every architecture has both of.
            if not found and "names" in self._config.model_fields_set:
                raise _nothing_to_change(pattern, metas, layer_map)
        if not chosen:
            raise _nothing_to_change(", ".join(self._config.names), metas, layer_map)
        self._chosen = chosen

    def begin(self, version: int, step: int, dtype: str, *, clean: bool = False) -> None:
        """Begin the sync of a weight version.

        Args:
            dtype: that the engine computes in.
            clean: without noise, whatever the schedule says.

        Raises:
            ConfigError: the schedule does not know how many steps the run has.
        """
        self._version, self._stage = version, 0
        if not clean:
            if self.num_steps is None:
                raise ConfigError(
                    "sync.noise goes by the steps of the run, and their number is not known; "
                    "set sync.noise.steps, or call session.begin_run(num_steps)"
                )
            self._stage = self._schedule.stage(step, self.num_steps)
        self._sigma = self._schedule.sigma(self._stage)
        self._dtype = getattr(torch, dtype, None)
        self._left, self._numel = 0.0, 0

    def stamps(self, clean: Mapping[str, Hashable]) -> Mapping[str, Hashable]:
        """Return the stamps (`Source.unchanging`) of what is sent, given those of the source's."""
        mark = (self._seed, self._version, self._sigma) if self._sigma else None
        return {name: (s, mark) if name in self._chosen else s for name, s in clean.items()}

    def storages(self, known: Mapping[str, Storage]) -> dict[str, Storage]:
        """Return the memory of what is sent, given that of the source's tensors."""
        own = {n: Storage(f"noisy {n}", meta.nbytes) for n, meta in self._chosen.items()}
        return {**known, **own}

    def onto(self, tensors: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the same stream with noise on the chosen tensors, as copies of their own.

        Without noise they are copies too, equal to the bit: the plan of every stage is the same.
        """
        for name, tensor in tensors:
            if name not in self._chosen:
                yield name, tensor
                continue
            noisy = tensor.detach().clone()
            if self._sigma:
                noise = draw(self._seed, self._version, name, noisy.shape, self._sigma)
                noisy = with_noise(noisy, noise)
                arriving = self._dtype or noisy.dtype
                change = noisy.to(arriving).double() - tensor.detach().to(arriving).double()
                self._left += float(change.square().sum())
                self._numel += change.numel()
            yield name, noisy

    def noise(self) -> dict[str, torch.Tensor]:
        """Return the noise of this sync, by name, in float32."""
        return noise_of(self.report())

    def report(self) -> dict[str, Any]:
        """Return what `SyncReport.noise` says of this sync."""
        return {
            "sigma": self._sigma,
            "stage": self._stage,
            "intervals": self._config.intervals,
            "seed": self._seed,
            "version": self._version,
            "arrived_sigma": (self._left / self._numel) ** 0.5 if self._numel else 0.0,
            "shapes": {n: list(m.shape) for n, m in self._chosen.items()} if self._sigma else {},
        }


def noise_of(report: SyncReport | Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the noise that a sync added, by checkpoint name: float32, on the CPU.

    Example:
        noise = noise_of(callback.reports[-1])
        norms = {n: p for n, p in model.named_parameters() if n in noise}
        noisy = {n: (p.float() + noise[n]).to(p.dtype) for n, p in norms.items()}
        logits = torch.func.functional_call(model, noisy, (input_ids,)).logits

    Empty for a sync without noise.

    Args:
        report: a report, a line of a run's syncs.jsonl, or what either has as `noise`.
    """
    whole = report if isinstance(report, Mapping) else {"noise": report.noise}
    said: Mapping[str, Any] = whole.get("noise", whole) or {}
    return {
        name: draw(said["seed"], said["version"], name, shape, said["sigma"])
        for name, shape in said.get("shapes", {}).items()
    }


def draw(seed: int, version: int, name: str, shape: Sequence[int], sigma: float) -> torch.Tensor:
    """Return N(0, sigma^2) in float32, which depends on the arguments alone: neither on the order
    of the tensors nor on the rank, the device or the processor that it is made for."""
    key = hashlib.blake2b(f"{seed}/{version}/{name}".encode(), digest_size=16).digest()
    # Not torch's generator, whose values depend on the processor's vector instructions.
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32)) * sigma


def with_noise(weight: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the sum as a new tensor, rounded once to the weight's dtype."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(exact) + noise.to(weight.device, exact)).to(weight.dtype)


def _kinds(layer_map: LayerMap, name: str) -> set[str]:
    """Return the classes of the vLLM layers that a tensor lands in."""
    return {layer_map.layers[c.parent_layer].kind for c in layer_map.contributions[name]}


def _nothing_to_change(
    pattern: str, metas: Sequence[ParamMeta], layer_map: LayerMap
) -> ConfigError:
    norms = [m.name for m in metas if any("RMSNorm" in k for k in _kinds(layer_map, m.name))]
    known = f"it has {', '.join(norms[:4])}" if norms else "it has no RMSNorm at all"
    return ConfigError(
        f"sync.noise.names: {pattern} matches no RMSNorm weight of this model; {known}. Give "
        "patterns of those that it has, or leave sync.noise out",
        pattern=pattern,
    )
