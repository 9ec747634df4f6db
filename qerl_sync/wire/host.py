"""Identify this machine."""

from __future__ import annotations

import platform
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_id() -> str:
    """Return the same text for all processes under one running kernel, containers included."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return platform.node()
