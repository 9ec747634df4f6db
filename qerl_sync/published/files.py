"""The files of a published version: tensors, and a manifest that is written last.

    v0000000016-5f3a...-full-00000.safetensors       all tensors of version 16
    v0000000016-5f3a...-full.manifest.json           now it is there
    v0000000017-5f3a...-changes-00000.safetensors    what has changed since version 16
    v0000000017-5f3a...-changes.manifest.json

What no manifest names is not read. A manifest has the digest of each of its files, and that of the
manifest that it builds on, so that what is torn, lost, or of another publisher is noticed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qerl_sync.errors import ConfigError, PublicationError

_NAME = re.compile(r"v(\d{10})-([0-9a-f]{16})-(full|changes)")
_MANIFEST = ".manifest.json"
_READ_BYTES = 16 << 20

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^v\d{10}-[0-9a-f]{16}-(full|changes)$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorFile(_Part):
    """A file of tensors in safetensors' format; what comes as changes is there as bytes."""

    name: Annotated[str, Field(pattern=r"^v\d{10}-[0-9a-f]{16}-(full|changes)-\d{5}\.safetensors$")]
    nbytes: int
    sha256: Digest


class Base(_Part):
    """The version that changes are for."""

    name: Name
    digest: Digest


class Manifest(_Part):
    """Describe a version: its tensors, its files, and what it builds on.

    Attributes:
        base: None: its files hold all tensors.
        metas: all tensors: name, dtype, shape.
        checksums: of the values of each, once this version is put together (XXH3, 64 bits).
        changes: for tensors that come as changes, how many and how (`wire.mirror`). Those that no
            file has are as they were.
    """

    format: Literal[1] = 1
    name: Name
    version: int
    step: int
    base: Base | None
    files: list[TensorFile]
    metas: list[tuple[str, str, tuple[int, ...]]]
    checksums: list[int]
    changes: dict[str, tuple[int, int]]

    def encode(self) -> tuple[bytes, str]:
        """Return the file's bytes, a digest and what it is of, and the digest."""
        body = self.model_dump_json().encode()
        digest = hashlib.sha256(body).hexdigest()
        return digest.encode() + b"\n" + body, digest

    @classmethod
    def decode(cls, data: bytes, name: str) -> tuple[Manifest, str]:
        """Parse a manifest and return its digest, too.

        Raises:
            ValueError: it is torn, of another format, or has another name.
        """
        stated, _, body = data.partition(b"\n")
        digest = hashlib.sha256(body).hexdigest()
        if stated.decode("ascii", "replace") != digest:
            raise ValueError("its digest is not that of its bytes: it is torn, or was changed")
        found = cls.model_validate_json(body)
        if found.name != name or len(found.checksums) != len(found.metas):
            raise ValueError(f"it says of itself that it is {found.name}")
        return found, digest


@dataclass(frozen=True, order=True)
class Published:
    """A manifest in the listing."""

    version: int
    publisher: str
    is_full: bool

    @property
    def name(self) -> str:
        kind = "full" if self.is_full else "changes"
        return f"v{self.version:010d}-{self.publisher}-{kind}"


class Store:
    """A directory, or a prefix of an object store.

    Args:
        url: a path, or what fsspec knows (`s3://bucket/run`, `gs://`, `memory://`, ...).
        options: fsspec's `storage_options`: credentials, endpoints, timeouts.

    Raises:
        ConfigError: fsspec, or its part for that kind of store, is not installed.
    """

    def __init__(self, url: str, options: dict[str, Any] | None = None) -> None:
        try:
            import fsspec
            import safetensors  # noqa: F401
        except ImportError as exc:
            raise ConfigError(
                f"weights as files need fsspec and safetensors ({exc}); "
                "pip install 'qerl-sync[files]'"
            ) from exc
        self.url = url
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **(options or {}))
        except (ImportError, ValueError) as exc:
            raise ConfigError(f"fsspec cannot open {url!r}: {exc}") from exc

    def listing(self) -> list[str]:
        """Return the names of all files. Empty if the directory is not there."""
        with self._translating("", "listing it"):
            self._fs.invalidate_cache()
            if not self._fs.exists(self._root):
                return []
            paths = self._fs.ls(self._root, detail=False)
        return [str(path).rstrip("/").rpartition("/")[2] for path in paths]

    def published(self) -> list[Published]:
        """Return the versions that have a manifest, oldest first."""
        names = (n.removesuffix(_MANIFEST) for n in self.listing() if n.endswith(_MANIFEST))
        found = (_NAME.fullmatch(name) for name in names)
        return sorted(Published(int(m[1]), m[2], m[3] == "full") for m in found if m)

    def read_manifest(self, name: str) -> tuple[Manifest, str]:
        """Return a manifest and its digest. Raise PublicationError if it is torn or gone."""
        with self._translating(name + _MANIFEST, "reading it"):
            return Manifest.decode(self._fs.cat_file(self._path(name + _MANIFEST)), name)

    def write_manifest(self, manifest: Manifest) -> str:
        """Make a version visible, at once. Return the digest."""
        data, digest = manifest.encode()
        final = manifest.name + _MANIFEST
        with self._translating(final, "writing it"):
            # On a file system a reader could see half of it under its own name.
            self._fs.pipe_file(self._path(f".{final}"), data)
            self._fs.mv(self._path(f".{final}"), self._path(final))
        return digest

    def write_file(self, name: str, data: bytes) -> TensorFile:
        with self._translating(name, "writing it"):
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(self._path(name), data)
        return TensorFile(name=name, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def fetch(self, file: TensorFile, directory: Path) -> None:
        """Copy a file here. Raise PublicationError if it is gone, or not what the manifest says."""
        digest, nbytes = hashlib.sha256(), 0
        with (
            self._translating(file.name, "reading it"),
            self._fs.open(self._path(file.name), "rb") as there,
            (directory / file.name).open("wb") as here,
        ):
            while block := there.read(_READ_BYTES):
                digest.update(block)
                nbytes += len(block)
                here.write(block)
        if (nbytes, digest.hexdigest()) != (file.nbytes, file.sha256):
            raise PublicationError(
                f"{self._shown(file.name)} has {nbytes:,} bytes and the SHA-256 "
                f"{digest.hexdigest()[:12]}; its manifest says {file.nbytes:,} and "
                f"{file.sha256[:12]}: it is torn, or was changed",
                path=self._shown(file.name),
            )

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            with self._translating(name, "removing it"):
                self._fs.rm_file(self._path(name))

    def remove_older(self, version: int) -> None:
        """Remove the files of older versions: manifests first, so that no reader begins with a
        version that loses its files."""
        ours = ((name, _NAME.match(name.removeprefix("."))) for name in self.listing())
        old = [name for name, match in ours if match and int(match[1]) < version]
        self.remove(sorted(old, key=lambda name: not name.endswith(_MANIFEST)))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _shown(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    @contextmanager
    def _translating(self, name: str, doing: str) -> Iterator[None]:
        """Raise a store's errors, of whatever library, as ours."""
        try:
            yield
        except Exception as exc:
            raise PublicationError(
                f"{self._shown(name)}: {doing} failed: {type(exc).__name__}: {exc}",
                path=self._shown(name),
            ) from exc
