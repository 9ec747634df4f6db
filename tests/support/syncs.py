"""Syncs as a user of the library would run them."""

from __future__ import annotations

from typing import Any

from qerl_sync import HFSource, InProcessTransport, Source, SyncConfig, SyncReport, SyncSession
from support.engines import Subject


def session(subject: Subject, source: Source, **options: Any) -> SyncSession:
    return SyncSession(source, InProcessTransport(subject.engine), SyncConfig.of(**options))


def push(subject: Subject, version: int, **options: Any) -> SyncReport:
    """Sync that version of the model in a session of its own."""
    return session(subject, HFSource(subject.trainers[version]), **options).push()
