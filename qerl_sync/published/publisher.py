"""Write a source's weights as files."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qerl_sync.buffers.detect import require_finite
from qerl_sync.errors import ConfigError, PublicationError, PublisherTakenError
from qerl_sync.meta import metas_to_json
from qerl_sync.published.files import Base, Manifest, Published, Store, TensorFile
from qerl_sync.sources.base import Source
from qerl_sync.verify.checksum import checksum
from qerl_sync.verify.stream import as_planned
from qerl_sync.wire.mirror import WHOLE, Mirror

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class Publication:
    """Report what `Publisher.publish` has written.

    Attributes:
        is_full: all tensors, not changes alone.
        nbytes: of the files of tensors.
        mirror_bytes: host memory in which the publisher keeps what it published last.
    """

    version: int
    step: int
    is_full: bool
    nbytes: int
    mirror_bytes: int


class Publisher:
    """Writes versions of a source's weights into a directory or an object store.

    Example:
        publisher = Publisher("s3://bucket/run", snapshot_every=16)
        for step in range(1, 101):
            train(model)
            publisher.publish(HFSource(model), step=step)

    The first version, and each `snapshot_every`-th, has all tensors; those between have the changed
    elements. A directory has one publisher at a time; one that starts later goes on with the
    versions of the one before, with all tensors first.

    Args:
        url: a path, or what fsspec knows. See `published.files`.
        snapshot_every: versions from one with all tensors to the next.
        keep_snapshots: how many of those stay, with what builds on them. Older files are removed.
        storage_options: fsspec's.

    Attributes:
        version: the last that was published; 0: none.
    """

    def __init__(
        self,
        url: str,
        *,
        snapshot_every: int = 16,
        keep_snapshots: int = 2,
        storage_options: dict[str, Any] | None = None,
    ) -> None:
        if snapshot_every < 1 or keep_snapshots < 1:
            raise ConfigError(
                f"snapshot_every is {snapshot_every} and keep_snapshots {keep_snapshots}; each "
                "must be 1 or more"
            )
        self._store = Store(url, storage_options)
        self._snapshot_every, self._keep_snapshots = snapshot_every, keep_snapshots
        self._id = secrets.token_hex(8)
        self._earlier = set(self._store.published())
        self._spent_version = max((one.version for one in self._earlier), default=0)
        self.version = self._spent_version
        self._base: Base | None = None
        self._since_snapshot = 0
        self._mirror: Mirror | None = None
        self._checksums: dict[str, int] = {}

    def publish(self, source: Source, *, step: int = 0) -> Publication:
        """Write the source's weights as the next version.

        After a failure no reader sees anything of it, and the next version has all tensors.

        Raises:
            PublisherTakenError: another publisher writes there.
            PublicationError: the store fails; `path`.
            CoverageError: a weight is NaN or infinite.
            ConfigError: the source has adapters, or is sharded.
        """
        if source.collective or source.held_names() is not None or source.adapter() is not None:
            raise ConfigError(
                f"{type(source).__name__} is sharded or has an adapter of its own, which is not "
                "published; publish whole models, with adapters merged (PEFTSource)"
            )
        self._require_alone()
        metas = source.metadata()
        # A number that a failed attempt had is not used again: what it has left behind, perhaps
        # even its manifest, must not be taken for the next one's.
        self._spent_version += 1
        if self._mirror is None or self._mirror.metas != tuple(metas):
            self._mirror = None  # not two at a time
            self._mirror = Mirror(metas)
        mirror, base = self._mirror, self._base
        if mirror.version != self.version or self._since_snapshot + 1 >= self._snapshot_every:
            base = None
        this = Published(self._spent_version, self._id, base is None)
        checksums: dict[str, int] = {}
        changes: dict[str, tuple[int, int]] = {}
        files: list[TensorFile] = []

        def changed() -> Iterator[tuple[str, torch.Tensor]]:
            """Yield what this version has of each tensor. Fill in the rest of its manifest."""
            stream = source.materialize([meta.name for meta in metas])
            for meta, tensor in as_planned(metas, stream):
                require_finite(meta.name, tensor)
                checksums[meta.name] = checksum(tensor)
                if base is None:
                    yield meta.name, mirror.take(meta.name, tensor)
                elif self._checksums[meta.name] != checksums[meta.name]:
                    raw, change = mirror.changes(meta.name, tensor)
                    if change != WHOLE:
                        changes[meta.name] = change
                    yield meta.name, raw

        try:
            for number, data in enumerate(_files(changed())):
                files.append(self._store.write_file(f"{this.name}-{number:05d}.safetensors", data))
            source.require_unwritten()
            digest = self._store.write_manifest(
                Manifest(
                    name=this.name,
                    version=this.version,
                    step=step,
                    base=base,
                    files=files,
                    metas=metas_to_json(metas),
                    checksums=[checksums[meta.name] for meta in metas],
                    changes=changes,
                )
            )
        except BaseException:
            # The mirror holds a mix of two versions: the next one is not made from it.
            mirror.version = None
            with suppress(PublicationError):
                self._store.remove(file.name for file in files)
            raise
        finally:
            source.end_sync()
        self.version = mirror.version = this.version
        self._base, self._checksums = Base(name=this.name, digest=digest), checksums
        self._since_snapshot = 0 if base is None else self._since_snapshot + 1
        if base is None:
            self._remove_old()
        nbytes = sum(file.nbytes for file in files)
        return Publication(this.version, step, base is None, nbytes, mirror.nbytes)

    def _require_alone(self) -> None:
        others = [one for one in self._store.published() if one.publisher != self._id]
        new = [one for one in others if one not in self._earlier]
        if new:
            raise PublisherTakenError(
                f"{self._store.url} has {new[-1].name}, which another publisher has written since "
                "this one was made; give each a directory of its own, or end one of them and make "
                "the other anew",
                path=self._store.url,
                version=new[-1].version,
            )

    def _remove_old(self) -> None:
        """Remove what is older than the snapshots to keep."""
        try:
            snapshots = [one.version for one in self._store.published() if one.is_full]
            if len(snapshots) > self._keep_snapshots:
                self._store.remove_older(snapshots[-self._keep_snapshots])
        except PublicationError as exc:  # the version is there
            logger.warning("old versions could not be removed: %s", exc)


def _files(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[bytes]:
    """Yield files that are not much larger than FILE_BYTES; none for no tensors."""
    from safetensors.torch import save

    waiting: dict[str, torch.Tensor] = {}
    nbytes = 0
    for name, tensor in tensors:
        waiting[name] = tensor
        nbytes += tensor.nbytes
        if nbytes >= FILE_BYTES:
            yield save(waiting)
            waiting, nbytes = {}, 0
    if waiting:
        yield save(waiting)
