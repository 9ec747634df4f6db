"""What cases do: break one sync, and tell what the trainer saw of it."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from support.ports import free_port
from support.relay import HOST as RELAYED
from support.relay import Relay

from faults.engines import NEW, OLD, FaultEngine
from faults.spoilers import Pairs, Spoil, victim_of
from faults.trainer import TrainerProcess
from faults.triggers import FaultySource, InjectedFault, PhasedRemote, Trigger
from qerl_sync import SyncError, SyncSession
from qerl_sync.errors import CoverageError, EngineTakenError, IntegrityError, StaleCacheError
from qerl_sync.transports.remote import connection as remote_connection
from qerl_sync.wire.tokens import TOKEN_VARIABLE

# An order of the source, kept, in which the query parts of all layers come before the rest of them.
SEVERAL_OPEN: dict[str, Any] = {"policy": "warn", "source_order": "size"}


@dataclass
class Injection:
    """A sync that was broken, as its trainer saw it.

    Attributes:
        pids: processes that were started for it.
        survivors: processes that live on until the case is judged.
    """

    error: BaseException | str | None = None
    detection_seconds: float | None = None
    note: str = ""
    pids: tuple[int, ...] = ()
    survivors: tuple[int, ...] = ()

    def require(self, expected: type[SyncError]) -> Injection:
        """Return this, with another error in place of one that is not `expected`."""
        if not isinstance(self.error, expected):
            self.error = AssertionError(f"{self.error!r} is no {expected.__name__}")
        return self


def push(
    engine: FaultEngine,
    trigger: Trigger | None = None,
    pairs: Pairs | None = None,
    spoil: Spoil | None = None,
    *,
    open_at: str | None = None,
    **options: Any,
) -> Injection:
    """Sync NEW with a fault in it.

    Args:
        pairs: what is sent; None: the checkpoint as it is.
        open_at: the tensor that it is about, where the case says that several layers are open then.
    """
    trigger = trigger or Trigger()
    source = FaultySource(engine.pairs if pairs is None else pairs, trigger, spoil)
    session = engine.session(source, trigger, **options)
    injection = _attempt(session.push, trigger, session.close)
    if open_at is not None:
        _require_several_open(session, open_at)
    return injection


def _attempt(act: Callable[[], Any], trigger: Trigger, close: Callable[[], None]) -> Injection:
    begun = time.monotonic()
    try:
        act()
    except Exception as exc:
        known = trigger.detected_at or time.monotonic()
        return Injection(exc, known - (trigger.fired_at or begun))
    finally:
        close()
    return Injection()


def _require_several_open(session: SyncSession, name: str) -> None:
    """Raise where the case is not what its name says."""
    steps = session.plan.predicted.steps if session.plan is not None else ()
    found = next((step.open_layers for step in steps if step.name == name), 0)
    if found < 2:
        raise AssertionError(
            f"{found} layers are open when {name} comes, not several; choose another source_order "
            "or tensor for this model"
        )


def at_phase(phase: str, do: Callable[[PhasedRemote], None], engine: FaultEngine) -> Injection:
    trigger = Trigger(phase)
    session = engine.session(FaultySource(engine.pairs, trigger), trigger)
    transport: Any = session._transport
    trigger.action = lambda: do(transport)
    return _attempt(session.push, trigger, session.close)


# ------------------------------------------------------------------------------ the processes


def kill_worker(phase: str, engine: FaultEngine) -> Injection:
    return at_phase(phase, lambda t: os.kill(t.pids()[-1], signal.SIGKILL), engine)


def stop_worker(phase: str, engine: FaultEngine) -> Injection:
    stopped: list[int] = []

    def stop(transport: PhasedRemote) -> None:
        stopped.append(transport.pids()[-1])
        os.kill(stopped[0], signal.SIGSTOP)

    try:
        return at_phase(phase, stop, engine)
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


def cut(phase: str, engine: FaultEngine) -> Injection:
    return at_phase(phase, PhasedRemote.cut, engine)


def fail_trainer(phase: str, engine: FaultEngine) -> Injection:
    def fail(_: object) -> None:
        raise InjectedFault("the trainer failed")

    return at_phase(phase, fail, engine)


def signal_trainer(phase: str, action: str, engine: FaultEngine) -> Injection:
    trainer = TrainerProcess(engine.client(), engine.paths[NEW], phase, action)
    trainer.run()
    fault = trainer.fired_at if action == "stop" else trainer.ended_at
    seconds = None
    # With "" nothing was to be noticed; before the fault no call was open that it could end.
    if trainer.error != "" and trainer.freed_at and fault and trainer.freed_at > fault - 0.05:
        seconds = trainer.freed_at - fault
    note = "" if trainer.error is None else "the trainer went on"
    return Injection(trainer.error or None, seconds, note, (trainer.pid,), trainer.children)


def no_shared_memory(engine: FaultEngine) -> Injection:
    """The kernel refuses the memory of the slots: no file of this process may become so large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    smaller_than_any_slot = 4096

    def forbid(_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (smaller_than_any_slot, hard))

    try:
        return at_phase("before start", forbid, engine)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ------------------------------------------------------------------------- damage in transit


def damaged_on_the_network(engine: FaultEngine) -> Injection:
    """A relay between trainer and worker changes one bit of a tensor's bytes."""
    trigger = Trigger()
    victim = engine.tensors[NEW][victim_of(engine.tensors[NEW])].numpy().tobytes()
    # Some of them lie whole in what the relay reads at once, wherever that begins.
    blocks = [victim[at : at + 64] for at in range(0, len(victim), 64)]

    def damage(data: bytes) -> bytes:
        at = next((data.index(block) for block in blocks if block in data), None)
        if at is None or trigger.fired_at is not None:
            return data
        trigger.mark()
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    port = free_port()
    relay = Relay(port)
    relay.to_worker = damage
    reached = {"transport": "tcp", "address": RELAYED, "bind": "127.0.0.1", "port": port}
    with _far_apart(engine):
        transport = engine.transport(trigger, **reached)
        session = engine.session(FaultySource(engine.pairs), transport=transport)
        try:
            injection = _attempt(session.push, trigger, session.close)
        finally:
            relay.close()
    if trigger.fired_at is None:
        raise AssertionError("the relay did not see the tensor's bytes")
    return injection.require(IntegrityError)


@contextmanager
def _far_apart(engine: FaultEngine) -> Iterator[None]:
    """Trainer and workers share a token, and the trainer takes them for another host's."""
    token = "that trainer and workers know"
    engine.rpc("set_variable", TOKEN_VARIABLE, token)
    try:
        with (
            patch.dict(os.environ, {TOKEN_VARIABLE: token}),
            patch.object(remote_connection, "host_id", lambda: "another host"),
        ):
            yield
    finally:
        engine.rpc("set_variable", TOKEN_VARIABLE, "")


def damaged_in_shared_memory(engine: FaultEngine) -> Injection:
    """A sign flips in a slot after the checksums were taken."""
    trigger = Trigger()
    session = engine.session(FaultySource(engine.pairs), trigger, verify="checksum")
    transport: Any = session._transport
    announce = transport.announce

    def damage(index: int, staged: Any) -> None:
        if index == 1:
            trigger.mark()
            staged.pieces[0].bytes[3] ^= 0x80
        announce(index, staged)

    transport.announce = damage
    return _attempt(session.push, trigger, session.close).require(CoverageError)


# --------------------------------------------------------------------------------- the loader


def broken_loader(
    engine: FaultEngine, rank: int = -1, layer: str = "", **options: Any
) -> Injection:
    """vLLM fails when it processes a layer; see `WorkerExtension.break_loader`."""
    engine.rpc("break_loader", rank, layer)
    try:
        return push(engine, **options)
    finally:
        with suppress(Exception):
            engine.rpc("mend_loader")


def broken_loader_with_several_open(engine: FaultEngine) -> Injection:
    injection = broken_loader(engine, layer="layers.0.self_attn.qkv_proj", **SEVERAL_OPEN)
    others = re.search(r"(\d+) other layers have begun", str(injection.error))
    if others is None or others[1] == "0":  # as the worker counted them
        raise AssertionError(f"no other layer was open on the worker: {injection.error}")
    return injection


# ---------------------------------------------------------------------------- wrong use of us


def doubled_start(engine: FaultEngine) -> Injection:
    """A second sync while one is open: refused, and the first one goes on."""
    refused: list[SyncError] = []

    def again() -> None:
        try:
            engine.push(OLD)
        except SyncError as exc:
            refused.append(exc)

    injection = push(engine, Trigger("in a chunk", again))
    if injection.error is None:
        injection.error = refused[0] if refused else None
    injection.detection_seconds = None
    return injection


def finish_without_start(engine: FaultEngine) -> Injection:
    transport = engine.transport(Trigger())
    return _attempt(transport.finish, Trigger(), transport.close)


def two_trainers(engine: FaultEngine) -> Injection:
    """The second is turned away; the first pushes again."""
    with engine.session(FaultySource(engine.tensors[OLD])) as first:
        first.push()
        injection = push(engine)
        first.push()
    return injection


def second_live_trainer(engine: FaultEngine) -> Injection:
    """Another process is turned away while the first trainer lives, and that one syncs NEW."""
    parameters = {name: tensor.clone() for name, tensor in engine.tensors[OLD].items()}
    with engine.session(FaultySource(parameters)) as first:
        first.push()
        second = TrainerProcess(engine.client(), engine.paths[NEW], "", "")
        second.run()
        error: BaseException | str | None = second.error
        if not (second.error or "").startswith(EngineTakenError.__name__):
            error = AssertionError(f"{second.error!r} is no {EngineTakenError.__name__}")
        for name, tensor in parameters.items():  # as a trainer's step
            tensor.copy_(engine.tensors[NEW][name])
        first.push()
    return Injection(error, pids=(second.pid,))


def lost_view(engine: FaultEngine) -> Injection:
    """A buffer was a view of a parameter until that moved; see `WorkerExtension.lose_view`."""
    engine.rpc("lose_view")
    try:
        injection = push(engine)
        if not all(engine.rpc("view_is_renewed")):
            injection.error = AssertionError("the buffer holds the old values of its parameter")
    finally:
        engine.rpc("drop_view")
    return injection


# ------------------------------------------------------------------------------------- caches


def stale_embeddings(engine: FaultEngine) -> Injection:
    """vLLM fails to forget what the old vision tower has made of images."""
    core = engine.llm.llm_engine.engine_core
    with patch.object(core, "reset_encoder_cache", side_effect=RuntimeError("no")):
        return push(engine)


def stale_connector(engine: FaultEngine) -> Injection:
    """A KV connector that does not empty its cache after a sync."""
    from support.connectors import ResettableConnector

    with patch.object(ResettableConnector, "answers", False):
        injection = push(engine).require(StaleCacheError)
    named = getattr(injection.error, "connector", "")
    if named != ResettableConnector.__name__:
        raise AssertionError(f"the error names {named!r}, not the connector")
    return injection
