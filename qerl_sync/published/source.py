"""Read weights that another cluster's trainer has published."""

from __future__ import annotations

import logging
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qerl_sync.buffers.detect import dtype_name, storages_of
from qerl_sync.errors import PublicationError, SyncError
from qerl_sync.meta import ParamMeta, Storage, metas_from_json
from qerl_sync.published.files import Manifest, Published, Store
from qerl_sync.sources.base import Source
from qerl_sync.verify.checksum import checksum
from qerl_sync.wire.mirror import WHOLE, Mirror, travelling

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class PublishedSource(Source):
    """Yields the newest version that a `Publisher` has written and that is whole.

    Example:
        source = PublishedSource("s3://bucket/run")
        with SyncSession(source, transport, SyncConfig()) as session:
            while True:
                if source.refresh():  # the engine generates meanwhile
                    session.push(step=source.step)
                time.sleep(1)

    `refresh` brings everything here and puts it together; a push then pauses the engine for no
    longer than for weights of a trainer in this process, and commits on all workers together.

    A version that is torn, has a wrong digest, or lacks one that it builds on is refused, and the
    newest one before it, or the last with all tensors, is taken.

    Args:
        url, storage_options: see `Publisher`.
        directory: where files are kept while they are read; None: the system's for temporary files.

    Attributes:
        version, step: the publisher's, of what is here; 0: nothing.
        refused: versions newer than that which the last `refresh` refused, and why.
        mirror_bytes: host memory that it takes: that of the weights.
    """

    stable = True
    stamps_content = True

    def __init__(
        self,
        url: str,
        *,
        storage_options: dict[str, Any] | None = None,
        directory: str | None = None,
    ) -> None:
        self._store = Store(url, storage_options)
        self._directory = directory
        self._mirror: Mirror | None = None
        self._checksums: dict[str, int] = {}
        self._name = self._digest = ""
        self.version = self.step = 0
        self.refused: dict[str, str] = {}

    def refresh(self) -> bool:
        """Bring the newest version here. Return whether it is another than before.

        Raises:
            PublicationError: there are versions, and none of them is whole; or all are older than
                what is here, which is no longer there; or the store fails.
        """
        listed = self._store.published()
        self.refused = {}
        gone = self._is_whole and self._name not in (one.name for one in listed)
        if gone and listed and listed[-1].version <= self.version:
            # A new run counts from 1: its versions would pass for old ones until they are more.
            raise PublicationError(
                f"{self._store.url} no longer has version {self.version}, which is here, and its "
                f"newest is {listed[-1].version}: another run has begun there, or files were "
                "removed. Read it with a new PublishedSource",
                path=self._store.url,
                version=listed[-1].version,
            )
        while chain := self._chain(listed):
            with TemporaryDirectory(prefix="qerl-sync-", dir=self._directory) as directory:
                here = Path(directory)
                try:
                    for manifest, _ in chain:  # all of it, before what is held is touched
                        for file in manifest.files:
                            self._store.fetch(file, here)
                except PublicationError as exc:
                    self._refuse(manifest.name, exc)
                    continue
                try:
                    for manifest, _ in chain:
                        self._put([here / file.name for file in manifest.files], manifest)
                    self._require_right(manifest)
                except SyncError as exc:
                    # The mirror holds a mix of two versions: begin again with all tensors.
                    assert self._mirror is not None
                    self._mirror.version = None
                    self._refuse(chain[-1][0].name, exc)
                    continue
            newest, self._digest = chain[-1]
            assert self._mirror is not None
            self.version = self._mirror.version = newest.version
            self._name = newest.name
            self.step = newest.step
            return True
        if listed and not self._is_whole:
            raise PublicationError(
                f"{self._store.url} has {len(listed)} versions, and none that is whole: "
                f"{'; '.join(self.refused.values())}",
                path=self._store.url,
            )
        return False

    @property
    def mirror_bytes(self) -> int:
        return 0 if self._mirror is None else self._mirror.nbytes

    # ---- what a session asks

    def metadata(self) -> list[ParamMeta]:
        return list(self._whole().metas)

    def content_stamps(self) -> Mapping[str, Hashable]:
        return self._checksums

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def storages(self) -> Mapping[str, Storage]:
        mirror = self._whole()
        return {meta.name: storages_of(mirror.tensor(meta.name))[0] for meta in mirror.metas}

    def resident_bytes(self) -> int:
        return sum({s.key: s.nbytes for s in self.storages().values()}.values())

    def materialize(self, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        mirror = self._whole()
        for name in names:
            yield name, mirror.tensor(name)

    # ---- how a version is put together

    @property
    def _is_whole(self) -> bool:
        return self._mirror is not None and self._mirror.version is not None

    def _whole(self) -> Mirror:
        if self._mirror is None or self._mirror.version is None:
            raise PublicationError(
                f"no version of {self._store.url} is here; call refresh() until it returns True, "
                "then push",
                path=self._store.url,
            )
        return self._mirror

    def _chain(self, listed: Sequence[Published]) -> list[tuple[Manifest, str]]:
        """Return what leads to the newest version that is not refused, from what is here or from
        all tensors; nothing where what is here is the newest. Refuse those that nothing leads to.
        """
        there = {one.name for one in listed}
        for target in reversed(listed):
            if self._is_whole and target.version <= self.version:
                break
            try:
                return self._chain_to(target.name, there)
            except PublicationError as exc:
                if target.name not in self.refused:
                    self._refuse(target.name, exc)
        return []

    def _chain_to(self, name: str, there: Collection[str]) -> list[tuple[Manifest, str]]:
        chain: list[tuple[Manifest, str]] = []
        expected = ""
        while True:
            if name in self.refused:
                raise PublicationError(f"{name} is refused")
            if name not in there:
                raise PublicationError(f"it builds on {name}, which is not there")
            manifest, digest = self._store.read_manifest(name)
            if expected and digest != expected:
                raise PublicationError(f"it builds on another {name} than is there")
            chain.insert(0, (manifest, digest))
            base = manifest.base
            if base is None or (self._is_whole and base.digest == self._digest):
                return chain
            name, expected = base.name, base.digest

    def _put(self, paths: Sequence[Path], manifest: Manifest) -> None:
        """Put a version's files into the mirror.

        Raises:
            SyncError: they are not what the manifest says.
        """
        from safetensors.torch import load_file

        metas = tuple(metas_from_json(manifest.metas))
        if self._mirror is None or (manifest.base is None and self._mirror.metas != metas):
            self._mirror = None  # not two at a time
            self._mirror = Mirror(metas)
        mirror, of = self._mirror, {meta.name: meta for meta in metas}
        if mirror.metas != metas:
            raise PublicationError(f"{manifest.name} has other tensors than what it builds on")
        brought: set[str] = set()
        for path in paths:
            for name, tensor in load_file(path).items():
                change = manifest.changes.get(name, WHOLE)
                if name not in of or name in brought:
                    raise PublicationError(f"{path.name} brings {name!r}, which is not awaited")
                (coming,) = travelling([of[name]], [change])
                if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (coming.dtype, coming.shape):
                    raise PublicationError(
                        f"{path.name} has {name!r} as {dtype_name(tensor.dtype)} "
                        f"{list(tensor.shape)}, and {coming.dtype} {list(coming.shape)} was to come"
                    )
                mirror.apply([of[name]], [tensor], [change])
                brought.add(name)
        if manifest.base is None and len(brought) < len(metas):
            missing = next(meta.name for meta in metas if meta.name not in brought)
            raise PublicationError(f"{manifest.name} lacks {missing!r}, the first of all it lacks")

    def _require_right(self, manifest: Manifest) -> None:
        """Raise PublicationError unless the mirror has the values that the publisher had."""
        assert self._mirror is not None
        wanted = dict(zip((m[0] for m in manifest.metas), manifest.checksums, strict=True))
        for name, expected in wanted.items():
            if checksum(self._mirror.tensor(name)) != expected:
                raise PublicationError(
                    f"{manifest.name}: {name!r} has other values than the publisher had"
                )
        self._checksums = wanted

    def _refuse(self, name: str, why: object) -> None:
        self.refused[name] = f"{name}: {why}"
        logger.warning("a published version is refused: %s: %s", name, why)
