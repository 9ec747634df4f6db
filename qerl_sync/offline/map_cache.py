"""Keep layer maps on disk: to observe one takes seconds and vLLM's imports."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from qerl_sync.plan.offline_map import OfflineMap

# Raise it when a map would come out differently from the same key: new fields, other checks.
FORMAT = 2


def cache_directory() -> Path:
    """Return where maps are kept: `$XDG_CACHE_HOME/qerl-sync/maps`, by default under `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "qerl-sync", "maps")


def cache_file(key: Mapping[str, Any]) -> Path:
    """Return the file for a map that depends on `key`, a JSON value."""
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True, separators=(",", ":"))
    return cache_directory() / f"{hashlib.sha256(text.encode()).hexdigest()}.json.gz"


def load(file: Path) -> OfflineMap | None:
    """Read a map. None if there is no such file, or if it is damaged: gzip's checksum tells."""
    try:
        data = json.loads(gzip.decompress(file.read_bytes()))
        return replace(OfflineMap.from_json(data), origin="cache")
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return None


def store(file: Path, found: OfflineMap) -> None:
    """Write a map where that is possible. Readers see the old file or the new one."""
    data = json.dumps(found.to_json(), separators=(",", ":")).encode()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        # In a directory of its own, which goes in any case: a full disk leaves half a file.
        with tempfile.TemporaryDirectory(dir=file.parent) as directory:
            partial = Path(directory, file.name)
            partial.write_bytes(gzip.compress(data, compresslevel=1))
            partial.replace(file)
