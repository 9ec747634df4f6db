"""Record each distinct plan of a run, and the trace that was measured under it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qerl_sync.buffers.trace import Trace
from qerl_sync.errors import ConfigError, PlanError
from qerl_sync.meta import ParamMeta, Storage
from qerl_sync.plan.sync_plan import SyncPlan

RECORD_FORMAT = 1
PLANS = "plans"


@dataclass(frozen=True)
class SyncRecord:
    """One distinct plan of a run.

    Attributes:
        plan: as it was agreed on before the sync.
        measured: the trace of the first sync that ran it.
        source_order: the name of the source's order (`sync.source_order`).
        chunk_bytes: what the plan was cut by: `sync.chunk_bytes`, else that of the transport.
        storages: the memory behind each of the source's tensors, where several share one.
    """

    plan: SyncPlan
    measured: Trace
    source_order: str
    chunk_bytes: int | None = None
    storages: Mapping[str, Storage] = field(default_factory=dict)

    @property
    def source_names(self) -> list[str]:
        """Return the order in which the source yielded, before any policy."""
        return [step.name for step in self.plan.as_given.steps]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": RECORD_FORMAT,
            "source_order": self.source_order,
            "chunk_bytes": self.chunk_bytes,
            "storages": {n: [s.key, s.nbytes] for n, s in self.storages.items()},
            "plan": self.plan.to_json(),
            "measured": self.measured.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SyncRecord:
        return cls(
            plan=SyncPlan.from_json(data["plan"]),
            measured=Trace.from_json(data["measured"]),
            source_order=data["source_order"],
            chunk_bytes=data["chunk_bytes"],
            storages={name: Storage(*fields) for name, fields in data["storages"].items()},
        )


def shared_storages(
    metas: Sequence[ParamMeta], storages: Mapping[str, Storage]
) -> dict[str, Storage]:
    """Return the storages that are more than one tensor's own memory: those worth recording."""
    holders = Counter(storage.key for storage in storages.values())
    return {
        meta.name: storages[meta.name]
        for meta in metas
        if meta.name in storages
        and (holders[storages[meta.name].key] > 1 or storages[meta.name].nbytes != meta.nbytes)
    }


def write_record(run: Path, record: SyncRecord) -> Path:
    """Write it into the directory of a run. Atomic: no reader sees half a record."""
    path = _path(run, record.plan.digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record.to_json()) + "\n", encoding="utf-8")
    partial.rename(path)
    return path


def has_record(run: Path, plan_digest: str) -> bool:
    return _path(run, plan_digest).exists()


def _path(run: Path, plan_digest: str) -> Path:
    return run / PLANS / f"{plan_digest[:16]}.json"


def read_records(run: Path) -> list[SyncRecord]:
    """Return all records of a run, the oldest first.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    paths = sorted((run / PLANS).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not paths:
        raise ConfigError(
            f"{run} holds no recorded sync (no {PLANS}/*.json in it); give the output "
            "directory of a `qerl-sync train` run that has synced at least once"
        )
    return [_read(path) for path in paths]


def read_record(run: Path) -> SyncRecord:
    """Return the latest record of a run. Raises ConfigError like `read_records`."""
    return read_records(run)[-1]


def _read(path: Path) -> SyncRecord:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("format") != RECORD_FORMAT:
            raise ConfigError(
                f"{path}: record format {data.get('format')!r} cannot be read here, only "
                f"{RECORD_FORMAT}; record the run again with this version of qerl-sync"
            )
        return SyncRecord.from_json(data)
    except PlanError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ConfigError(
            f"{path} is no record of a sync ({type(exc).__name__}: {exc}); run the training again "
            "or name another run"
        ) from exc


def first_difference(planned: SyncPlan, record: SyncRecord) -> str | None:
    """Describe where a record first differs from `planned`; None: nowhere."""
    ours, theirs = planned.base_metas, record.plan.base_metas
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            return (
                f"tensor {i} is {mine.name} ({mine.dtype}, {list(mine.shape)}) in the plan and "
                f"{other.name} ({other.dtype}, {list(other.shape)}) in the run"
            )
    if len(ours) != len(theirs):
        longer, where = (ours, "plan") if len(ours) > len(theirs) else (theirs, "run")
        extra = longer[min(len(ours), len(theirs))].name
        return (
            f"the plan has {len(ours)} tensors and the run {len(theirs)}: {extra} is only in the "
            f"{where}"
        )
    return planned.predicted.first_difference(record.measured)
