"""Explain what went wrong in a run, what was unusual, and which line of YAML would help.

`qerl-sync explain` prints these, and the page of `qerl-sync report` shows them.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from math import ceil
from statistics import median
from typing import Any, Literal

from qerl_sync.meta import format_bytes
from qerl_sync.report.recorded import RecordedRun

NO_FINDINGS = "Nothing went wrong, and nothing was unusual."
SHOWN_LAYERS = 5
MIB = 1 << 20
# Advice is given above these shares: of a sync's time, and of the time of the training steps.
HIGH_SHARE, SHARE_OF_STEPS = 0.4, 0.2


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run, or could be better.

    Attributes:
        kind: `failed`: a sync, or the run. `warning`: the sync was committed, and is unusual.
            `advice`: syncs could take less memory or time.
        what: what happened, in a sentence.
        when: which sync, and step.
        layers: the parent layers or tensors that it concerns, in words.
        change: what to do about it; a line of YAML where there is one.
        said: the error's message.
    """

    kind: Literal["failed", "warning", "advice"]
    what: str
    when: str = ""
    cause: str = ""
    layers: tuple[str, ...] = ()
    change: str = ""
    said: str = ""

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, text) of what is known, in the order in which it is shown."""
        found = {
            "When": self.when,
            "Cause": self.cause,
            "Layers": "\n".join(self.layers),
            "Change": self.change,
            "Said": self.said,
        }
        return [(name, text) for name, text in found.items() if text]


# By class name: what the error means, its usual cause, what to change. A recorded error names its
# base classes, too; the most derived one that is listed here counts.
EXPLANATIONS = {
    "ConfigError": (
        "An option or argument cannot be right, so that nothing was sent.",
        "The configuration contradicts itself, or this engine.",
        "Change the option that is named below.",
    ),
    "FileError": (
        "A file or directory could not be used.",
        "It is missing, damaged, full or read-only.",
        "Look at the path that is named below; `qerl-sync doctor CONFIG` checks what is writable.",
    ),
    "CompatError": (
        "The installed vLLM or TRL lacks something that this sync needs.",
        "Its version is outside of those that were tested, or a feature is missing in its build.",
        "Run `qerl-sync doctor`, and install a version that it calls tested.",
    ),
    "LayerMapError": (
        "vLLM refused, ignored or lost a tensor in the dry run, before anything was sent.",
        "Trainer and engine have other architectures, or other shapes.",
        "Start the engine from the trainer's model; if vLLM is known to ignore the tensor: "
        "sync: {ignore_names: [PATTERN]}",
    ),
    "PlanError": (
        "No plan does what was asked for, so that nothing was sent.",
        "The budget is smaller than one parent layer needs, or the source's order was refused.",
        "sync: {policy: reorder}, or a larger sync.budget_bytes",
    ),
    "CoverageError": (
        "What arrived is not what the plan promised; the sync was ended.",
        "A tensor was missing, doubled, misshapen, not finite, or changed on its way.",
        "If values are NaN, look at the training; else at what writes to weights during a sync.",
    ),
    "UnchangedError": (
        "The sync was committed and brought nothing new, although the trainer has gone on.",
        "The source reads another model than the one that is trained, or an adapter was not "
        "merged.",
        "Give the session the model that the optimizer steps.",
    ),
    "LoadError": (
        "vLLM's own loader failed in the middle of a sync; its worker holds a mix of versions.",
        "vLLM raised the error below while it loaded or processed a layer, often for want of "
        "memory.",
        "Look at the engine's log. For memory: smaller sync.chunk_bytes, or a lower "
        "gpu_memory_utilization; sync: {on_failure: rollback} keeps the old weights serving.",
    ),
    "AgreementError": (
        "Trainer and worker differ in something that both must agree on; nothing was sent.",
        "Other versions, another plan or layer map: an engine was restarted or replaced.",
        "Install the same qerl-sync on both sides, and make the session anew.",
    ),
    "EngineTakenError": (
        "Another trainer holds the engine, and is alive.",
        "Two trainers were started for one engine.",
        "End the other one, or give each an engine of its own.",
    ),
    "StaleBaseError": (
        "A sync of a part of the model met a worker without the rest; everything is sent next.",
        "The worker was restarted, or something else has written to its weights.",
        "Nothing, if it happens once.",
    ),
    "PublicationError": (
        "Weights as files could not be written, or none that are there could be read.",
        "The disk is full, the store cannot be reached, or files are torn or gone.",
        "Look at the path in the message; the next version has all tensors.",
    ),
    "PublisherTakenError": (
        "Two publishers write to one directory.",
        "A run was started twice, or with the directory of another one.",
        "Give each a directory of its own.",
    ),
    "WorldSizeError": (
        "Not all workers of the engine have connected, or more than it has.",
        "A worker process died while the engine started, or cannot reach the trainer.",
        "Look at the engine's log, and at sync.trainer_address.",
    ),
    "TransportError": (
        "Tensors or messages did not get from one side to the other.",
        "The connection, or the memory between trainer and worker, failed.",
        "Look at the engine's log; the next sync connects anew.",
    ),
    "TransportTimeout": (
        "The other side did not answer in time.",
        "It hangs or is overloaded, or a layer takes longer than the timeout.",
        "Look at what the engine did then; if it only was slow: a larger sync.timeout_seconds",
    ),
    "PeerLostError": (
        "The other side closed the connection or died.",
        "Its process ended: killed for memory, crashed, or stopped.",
        "Look at the end of the engine's log (vllm.log), and for the out-of-memory killer (dmesg).",
    ),
    "IntegrityError": (
        "Bytes arrived that the other side did not send, or not then.",
        "Something between trainer and worker changed or repeated them.",
        "Look at proxies and network cards between the hosts; sync again.",
    ),
    "NoRoomError": (
        "Shared memory has less room than the chunks in flight take.",
        "/dev/shm is small (Docker gives 64 MB), or the GPU is full.",
        "Start the container with --shm-size=1g or --ipc=host, or smaller sync.chunk_bytes",
    ),
    "StaleCacheError": (
        "An engine keeps what old weights have computed, where a sync cannot remove it.",
        "A cache connector cannot be emptied, or requests in flight hold its blocks.",
        "sync: {recompute_running: true}, or an engine without that connector",
    ),
    "TrainerRankError": (
        "One trainer rank failed in other code, which ended the sync on all of them.",
        "The error below was raised there.",
        "Look at the log of that rank.",
    ),
    "PoisonedError": (
        "A worker refused to generate: it holds half of a sync.",
        "An earlier sync failed in its middle.",
        "Look at the first failure; the next sync that succeeds heals the worker.",
    ),
    "SyncError": ("The sync was refused or ended.", "The error below says why.", "What it names."),
    "KeyboardInterrupt": (
        "The run was interrupted in a sync.",
        "Ctrl-C.",
        "`qerl-sync train CONFIG --resume`",
    ),
    "MemoryError": (
        "There was no memory left on the trainer.",
        "Chunks in flight are held besides the model.",
        "Smaller sync.chunk_bytes, or sync: {chunks_in_flight: 1}",
    ),
    "Exception": (
        "Code of the trainer, or of a library, failed in a sync.",
        "The error below was raised while tensors were gathered or sent.",
        "Look at it in the run's traceback (--debug).",
    ),
}


def explain(run: RecordedRun) -> list[Finding]:
    """Return a run's failures, warnings and advice, each with the newest first."""
    failures = list(_failures(run))
    if not run.summary and not failures and run.config:
        failures = [
            Finding(
                "warning",
                "The run has no summary: it goes on, or it was ended from outside.",
                cause="No sync failed. What ends a run elsewhere leaves nothing here.",
                change="If it has ended: look at the terminal and vllm.log; `qerl-sync train "
                "CONFIG --resume` goes on from the last checkpoint.",
            )
        ]
    return [*failures, *_warnings(run), *_advice(run)]


def _failures(run: RecordedRun) -> Iterator[Finding]:
    """Yield a finding for each distinct failure."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for failure in reversed(run.failures):
        groups.setdefault((failure["error"], failure["message"]), []).append(failure)
    for group in groups.values():
        last = group[0]
        known = next((EXPLANATIONS[c] for c in last["classes"] if c in EXPLANATIONS), None)
        what, cause, change = known or EXPLANATIONS["Exception"]
        times = f", {len(group)} times" if len(group) > 1 else ""
        state = []
        if number := last["num_poisoned"]:
            refusing = "workers refuse" if number > 1 else "worker refuses"
            state.append(f"{number} {refusing} to generate until a sync succeeds.")
        elif last["version"] is not None:
            state.append(f"The workers keep version {last['version']}.")
        if any(sync["time"] > last["time"] for sync in run.syncs if "time" in sync):
            state.append("A later sync has succeeded.")
        step = "outside of a sync" if last["step"] is None else f"step {last['step']}"
        phase = f" in the phase {last['phase']}" if last["phase"] else ""
        moment = datetime.fromtimestamp(last["time"], timezone.utc)
        yield Finding(
            "failed",
            f"{last['error']}: {what} {' '.join(state)}",
            when=f"{moment:%Y-%m-%d %H:%M:%S} UTC, {step}{phase}{times}",
            cause=cause + (f" It was raised by {last['cause']}." if last["cause"] else ""),
            layers=tuple(_layers(last, run)),
            change=_precise(last, run) or change,
            said=last["message"],
        )


def _layers(failure: Mapping[str, Any], run: RecordedRun) -> Iterator[str]:
    """Yield the layers or tensors that the error names, else the layers open at the peak."""
    facts = failure["facts"]
    named = [str(facts[name]) for name in ("layer", "tensor", "parent_layer") if facts.get(name)]
    if named:
        expected = facts.get("expected")
        counted = f" got {facts.get('got')} of {expected} elements" if expected else ""
        yield from (name + counted for name in named)
    elif failure["sent"] and "TransportError" not in failure["classes"]:  # no matter of layers
        # What a failed sync was doing is not recorded: the plan's peak is the likeliest place.
        record = next((r for r in run.records if r.get("failure") == failure), None)
        if record is not None:
            yield from open_layers(record)


def open_layers(record: Mapping[str, Any]) -> list[str]:
    """Return the layers of a recorded sync that are open when most is buffered, in words."""
    found = [
        f"{name}: {format_bytes(nbytes)} for {loaded:,} of {total:,} elements"
        for name, nbytes, loaded, total in record.get("open_at_peak", [])[:SHOWN_LAYERS]
    ]
    rest = record.get("num_open_at_peak", 0) - len(found)
    return [*found, f"and {rest:,} more"] if rest > 0 else found


def _precise(failure: Mapping[str, Any], run: RecordedRun) -> str:
    """Return the line of YAML that the error's own numbers lead to; empty if they lead to none."""
    facts, error = failure["facts"], failure["error"]
    if error == "PlanError" and facts.get("needed_bytes"):
        return f"sync: {{budget_bytes: {facts['needed_bytes']}}}, or policy: spill"
    if error == "NoRoomError" and facts.get("free_bytes"):
        slots = run.sync_options.get("chunks_in_flight", 2)
        fits = int(facts["free_bytes"] / slots / MIB)
        if fits:
            return (
                f"sync: {{chunk_bytes: {fits}MiB}} fits if no parent layer is larger; or "
                "--shm-size=1g for the container"
            )
    if error == "TransportTimeout":
        seconds = run.sync_options.get("timeout_seconds", 300.0)
        return f"If it only was slow: sync: {{timeout_seconds: {4 * seconds:g}}}"
    return ""


def _warnings(run: RecordedRun) -> Iterator[Finding]:
    """Yield a finding for each kind of unusual sync that was committed, of its last one."""
    syncs = list(reversed(run.syncs))
    records = {record["version"]: record for record in run.records if "failure" not in record}

    def when(found: Sequence[Mapping[str, Any]]) -> str:
        often = f"{len(found):,} of {len(syncs):,} syncs; the last: " if len(found) > 1 else ""
        return f"{often}version {found[0]['version']}, step {found[0]['step']}"

    if differing := [sync for sync in syncs if not sync["prediction_exact"]]:
        last = differing[0]
        names = [w["worker"] for w in last["workers"] if not w["prediction_exact"]]
        yield Finding(
            "warning",
            "vLLM held something else than was predicted.",
            when=when(differing),
            cause="Its loader treated a tensor otherwise than in the dry run: "
            f"{last['first_difference']}. On: {', '.join(names[:SHOWN_LAYERS])}",
            layers=tuple(open_layers(records.get(last["version"], {}))),
            change="Only the memory differed: the weights are those that were sent. Report it with "
            "the run's directory, and leave memory some room: the budget was kept by prediction "
            "only.",
        )
    if over := [
        sync
        for sync in syncs
        if sync["budget_bytes"] and sync["peak_pinned_bytes_measured"] > sync["budget_bytes"]
    ]:
        pinned, budget = over[0]["peak_pinned_bytes_measured"], over[0]["budget_bytes"]
        yield Finding(
            "warning",
            f"{format_bytes(pinned)} were pinned, of a budget of {format_bytes(budget)}.",
            when=when(over),
            cause="The policy may only warn, or the prediction was wrong.",
            layers=tuple(open_layers(records.get(over[0]["version"], {}))),
            change="sync: {policy: reorder}",
        )
    if without := [sync for sync in syncs if sync["lost"]]:
        reasons = [f"{name}: {reason}" for name, reason in without[0]["lost"].items()]
        yield Finding(
            "warning",
            f"{len(reasons)} worker{'s were' if len(reasons) > 1 else ' was'} left behind.",
            when=when(without),
            cause="\n".join(reasons[:SHOWN_LAYERS]),
            change="They get a full sync when they answer again; look at their logs if not.",
        )
    if undelivered := [sync for sync in syncs if sync["undelivered"]]:
        yield Finding(
            "warning",
            "Parameters changed on the trainer and did not travel.",
            when=when(undelivered),
            cause="They are not among what the source yields: another model, or an adapter that "
            "is not merged.",
            layers=tuple(undelivered[0]["undelivered"][:SHOWN_LAYERS]),
            change="Give the session the model that the optimizer steps; sync: {on_unchanged: "
            "error} ends a run that does this.",
        )
    if slow := [record for record in reversed(run.records) if "slow" in record["unusual"]]:
        usual = median(sync["seconds"]["total"] for sync in syncs)
        seconds = slow[0]["seconds"]
        phase = _longest_phase(seconds)
        yield Finding(
            "warning",
            f"A sync took {seconds['total']:.2f} s; usual are {usual:.2f} s.",
            when=when(slow),
            cause=f"Most of it in the phase {phase}, {seconds[phase]:.2f} s.",
            change="If it recurs, record one: `qerl-sync train CONFIG --trace N`.",
        )


def _advice(run: RecordedRun) -> Iterator[Finding]:
    """Yield what would make syncs smaller or quicker, from the numbers of the last ones."""
    if not run.syncs:
        return
    last = run.syncs[-1]
    recent = run.syncs[-20:]
    seconds = {p: median(sync["seconds"][p] for sync in recent) for p in last["seconds"]}
    total = max(seconds["total"], 1e-9)
    records = [r for r in run.records if r["version"] == last["version"] and "failure" not in r]
    record = records[-1] if records else {}
    kind = last["transport"]
    reordered = record.get("reordered")
    if last["policy"] == "warn" and reordered and last["max_open_layers_measured"] > reordered[1]:
        now, then = last["peak_buffered_bytes_measured"], reordered[0]
        yield Finding(
            "advice",
            f"{last['max_open_layers_measured']} parent layers are open at once, with "
            f"{format_bytes(now)} buffered.",
            cause="The tensors of a parent layer do not arrive next to each other "
            f"(source order {record['source_order']}).",
            layers=tuple(open_layers(record)),
            change=f"sync: {{policy: reorder}} makes it {reordered[1]}, with {format_bytes(then)}. "
            "A source that cannot be reordered: sync: {policy: spill}",
        )
    waiting = seconds["verify"] / total
    verify = run.sync_options.get("verify", "coverage")
    if waiting > HIGH_SHARE and verify in ("checksum", "full"):
        yield Finding(
            "advice",
            f"{waiting:.0%} of a sync's time goes into verifying it.",
            cause=f"sync.verify: {verify} reads all weights about four times.",
            change="sync: {verify: coverage}",
        )
    if seconds["gather"] / total > HIGH_SHARE and last["num_chunks"] == 1:
        yield Finding(
            "advice",
            f"{seconds['gather'] / total:.0%} of a sync's time is spent waiting for the source.",
            cause="Everything is one chunk, so that nothing is loaded meanwhile.",
            change=f"sync: {{chunk_bytes: {_mib(last['sent_bytes'] / 8)}}}",
        )
    if (
        not kind.startswith("inproc")
        and 1 <= last["num_chunks"] < 4
        and last["sent_bytes"] > 8 * MIB
    ):
        yield Finding(
            "advice",
            f"{format_bytes(last['sent_bytes'])} travel in few chunks: {last['num_chunks']}.",
            cause="With so few, gathering, sending and loading hardly overlap.",
            change=f"sync: {{chunk_bytes: {_mib(last['sent_bytes'] / 16)}}}",
        )
    if "tcp" in kind and "/dev/shm" in kind:
        yield Finding(
            "advice",
            "Weights go over TCP although the worker is on this host.",
            cause=kind,
            change="Start the container with --shm-size=1g or --ipc=host",
        )
    share = run.summary.get("sync_time_share")
    if share is not None and share > SHARE_OF_STEPS:
        phase = _longest_phase(seconds)
        yield Finding(
            "advice",
            f"Syncs take {share:.0%} of the training's time.",
            cause=f"Most of a sync is the phase {phase}: {seconds[phase]:.2f} of {total:.2f} s.",
            change="trainer: {vllm_sync_frequency: N} syncs more rarely where the trainer has it; "
            "LoRA (peft: ...) sends adapters only",
        )


def _longest_phase(seconds: Mapping[str, float]) -> str:
    return max((p for p in seconds if p != "total"), key=lambda phase: seconds[phase])


def _mib(nbytes: float) -> str:
    return f"{max(1, ceil(nbytes / MIB))}MiB"


def as_text(findings: Sequence[Finding], width: int | None = None) -> str:
    """Return findings as lines of text. `width`: that no line exceeds; None: of any length."""
    blocks = []
    for finding in findings:
        lines = [("", f"{finding.kind}: {finding.what}")]
        for name, text in finding.rows():
            heads = [f"  {name + ':':<8} ", *[" " * 11] * text.count("\n")]
            lines += zip(heads, text.split("\n"), strict=True)
        blocks.append("\n".join(_wrapped(head, text, width) for head, text in lines))
    return "\n\n".join(blocks) or NO_FINDINGS


def _wrapped(head: str, text: str, width: int | None) -> str:
    if width is None:
        return head + text
    return textwrap.fill(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,  # names of layers and options are copied from here
        break_on_hyphens=False,
    )


def as_json(findings: Sequence[Finding]) -> str:
    """Return findings as JSON, with every field of `Finding`."""
    return json.dumps([vars(finding) for finding in findings], indent=2)
