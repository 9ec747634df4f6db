"""Rollout actors that die, refuse, hang and come back: what Ray tells, what the pool makes of it.

Real actors and real syncs, without vLLM; tests/ray/test_rollout_actors.py has the engines."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from support.loaders import HashedSource, TensorSource, tensors
from support.ray_cluster import one_node
from support.ray_echo import EchoRollout, Holder, Plain
from support.servers import wait_until

from qerl_sync import ConfigError, SyncConfig, SyncSession, TrainConfig, TransportError, WorkerPool
from qerl_sync.bench.echo import checksum as crc32
from qerl_sync.engines.ray_actor import RayActorClient, require_object_store
from qerl_sync.errors import CoverageError, PeerLostError, TransportTimeout
from qerl_sync.integrations.ray.actors import CONTROL, Rollout
from qerl_sync.integrations.ray.cluster import require_room_for_chunks
from qerl_sync.integrations.ray.llm import PooledLLM
from qerl_sync.integrations.ray.pool import start_actor
from qerl_sync.integrations.ray.shards import JoinedSource, as_bytes
from qerl_sync.training.display import Display
from qerl_sync.training.on_ray import (
    console_of,
    remote_display,
    show,
    start_terminal,
    train_on_ray,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROMPTS = [[1], [2], [3], [4]]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with one_node(num_cpus=8, object_store_memory=100 << 20):
        yield


@pytest.fixture
def start() -> Iterator[Any]:
    """`start("a", "b")`: a pool of actors with these names."""
    import ray

    handles: list[Any] = []

    def run(*names: str, kind: type = EchoRollout, max_restarts: int = -1, **options: Any) -> Any:
        made = {}
        for name in names:
            groups = {} if kind is Plain else {"concurrency_groups": {CONTROL: 2}}
            remote = ray.remote(num_cpus=0, max_restarts=max_restarts, **groups)
            made[name] = remote(kind).remote()
        handles.extend(made.values())
        ray.get([handle.__ray_ready__.remote() for handle in made.values()])
        return WorkerPool(made, **options)

    yield run
    for handle in handles:
        ray.kill(handle)


def session_of(pool: WorkerPool, **options: Any) -> SyncSession:
    config = SyncConfig.of(**{"timeout_seconds": 20, **options})
    return SyncSession(TensorSource(tensors(0)), pool.transport(config), config)


def pid_of(handle: Any) -> int:
    import ray

    return int(ray.get(handle.status.options(concurrency_group=CONTROL).remote())["pid"])


def ask(handle: Any, method: str, *arguments: Any) -> Any:
    import ray

    return ray.get(getattr(handle, method).remote(*arguments))


def test_changed_elements_travel_through_the_object_store(start: Any):
    pool = start("a", "b")
    weights = {f"layer.{i}": torch.randn(50, 60) for i in range(4)}
    config = SyncConfig.of(
        timeout_seconds=20, transport="ray", delta="elements", chunk_bytes=30_000
    )
    with SyncSession(HashedSource(weights), pool.transport(config), config) as session:
        for name in pool.handles:
            ask(pool.handles[name], "check", True)
        full = session.push()
        for tensor in weights.values():
            tensor[3, 4] += 1
        report = session.push()
        assert report.delta == {"sent": "elements", "reason": ""}
        assert report.wire_bytes < full.wire_bytes / 100
        right = {name: crc32(tensor) for name, tensor in weights.items()}
        assert all(ask(handle, "check", True) == right for handle in pool.handles.values())


# ---- generating


@pytest.mark.parametrize("kind", ["poisoned", "behind"])
def test_what_one_worker_refuses_is_generated_by_the_others(start: Any, kind: str):
    pool = start("a", "b")
    with session_of(pool) as session:
        session.push()
        ask(pool.handles["a"], "refuse", kind)
        found = pool.generate(PROMPTS)
        assert [one.prompt_ids for one in found] == PROMPTS
        assert {one.worker for one in found} == {str(pid_of(pool.handles["b"]))}
        assert pool.versions == {"a": 0, "b": 1}
        session.push()
        assert len({one.worker for one in pool.generate(PROMPTS)}) == 2


def test_an_error_about_what_was_asked_ends_the_call(start: Any):
    pool = start("a", "b")
    with session_of(pool) as session:
        session.push()
        ask(pool.handles["a"], "refuse", "wrong")
        with pytest.raises(ValueError, match="told to be wrong"):
            pool.generate(PROMPTS)


def test_a_worker_that_does_not_answer_is_lost_and_its_share_done_by_the_others(start: Any):
    import ray

    pool = start("a", "b", generate_seconds=1.0)
    with session_of(pool) as session:
        session.push()
        asleep = pool.handles["a"].sleep.remote(4.0)
        assert len({one.worker for one in pool.generate(PROMPTS)}) == 1
        assert pool.versions == {"a": 0, "b": 1}
        # Its control group answers; its engine's thread does not, and nobody waits for it.
        started = time.monotonic()
        report = session.push()
        assert time.monotonic() - started < 2
        why = r"not up again since version 1: a did not answer within 1 s, when it was asked to"
        assert re.match(why, report.lost["a"])
        ray.get(asleep)
        assert not session.push().lost


def test_a_timeout_names_who_what_and_how_long(start: Any):
    pool = start("a", generate_seconds=0.5)
    words = r"a did not answer within 0.5 s, when it was asked to generate for 4 prompts"
    with session_of(pool) as session:
        session.push()
        with pytest.raises(TransportError, match=words):
            pool.generate(PROMPTS, {"seconds": 3.0})


def test_those_that_somebody_else_syncs_are_asked_again_for_a_while(start: Any):
    pool = start("a")
    ask(pool.handles["a"], "refuse", "poisoned", "behind")
    assert len(pool.generate(PROMPTS)) == 4


def test_a_death_before_the_last_sync_does_not_cost_the_worker(start: Any):
    pool = start("a", "b")
    with session_of(pool) as session:
        session.push()
        batch = pool.submit(PROMPTS, {"seconds": 60.0})
        for handle in pool.handles.values():
            os.kill(pid_of(handle), signal.SIGKILL)
        while set(pool.versions.values()) != {session.version} or session.version < 2:
            pool.await_some(30)
            try:
                session.push()
            except TransportError:
                time.sleep(0.5)
        batch._sampling = None
        version = session.version
        assert {one.version for one in batch.result()} == {version}
        assert pool.versions == {"a": version, "b": version}


def test_a_pool_that_is_sent_keeps_its_timeout(start: Any):
    import pickle

    assert pickle.loads(pickle.dumps(start("a", generate_seconds=7.0))).generate_seconds == 7.0


# ---- all down at once


def test_a_run_whose_only_worker_dies_waits_for_it_and_goes_on(start: Any):
    pool = start("a")
    with session_of(pool) as session:
        session.push()
        llm = PooledLLM(pool)

        def recover() -> None:
            pool.await_some(150)  # machines with other work restart actors slowly
            session.push()

        llm.recover = recover
        os.kill(pid_of(pool.handles["a"]), signal.SIGKILL)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], None)
        assert [out.prompt_token_ids for out in outputs] == PROMPTS
        assert {one.version for one in llm.last} == {2}


def test_dead_for_good_is_told_from_restarting(start: Any):
    again, never = start("a"), start("b", max_restarts=0)
    with session_of(again) as session:
        session.push()
        os.kill(pid_of(again.handles["a"]), signal.SIGKILL)
        with pytest.raises(TransportError, match="Ray restarts it"):
            again.generate(PROMPTS)
    with session_of(never) as session:
        session.push()
        os.kill(pid_of(never.handles["b"]), signal.SIGKILL)
        with pytest.raises(TransportError, match="died and is not started again"):
            never.generate(PROMPTS)
        with pytest.raises(PeerLostError, match=r"all workers \(b\) died"):
            never.await_some(30)


def test_nobody_is_up_in_time(start: Any):
    pool = start("a")
    pool.wait(30)
    with session_of(pool) as session:
        session.push()
        pool._transport.forget("a", "it did not answer")  # type: ignore[union-attr]
        pool.handles["a"].sleep.remote(3.0)
        with pytest.raises(TransportTimeout, match="none of the workers a was up within 1 s"):
            pool.await_some(1.0)


class Dying(EchoRollout):
    """It ends whenever it is asked whether it is up."""

    def status(self) -> dict[str, Any]:
        time.sleep(1.0)
        os._exit(1)


def test_an_actor_that_dies_again_and_again_is_not_waited_for_longer(start: Any):
    pool, begun = start("a", kind=Dying), time.monotonic()
    with pytest.raises(TransportTimeout, match="a was not up within 6 s"):
        pool.wait(6.0)
    assert time.monotonic() - begun < 12.0


# ---- actors of one's own


class Miscounting(EchoRollout):
    def generate(self, prompts: Sequence[Any], sampling: Any, required: int) -> list[Rollout]:
        return super().generate(prompts, sampling, required)[: sampling["kept"]]


@pytest.mark.parametrize("kept", [0, 3])
def test_an_actor_whose_completions_do_not_fit_the_prompts_is_left_out(start: Any, kept: int):
    pool = start("a", kind=Miscounting)
    with pytest.raises(TransportError, match=f"a returned {kept} completions for 4 prompts"):
        pool.generate(PROMPTS, {"kept": kept}, required_version=0)


def test_an_actor_with_the_four_methods_only_is_synced_beside_others(start: Any):
    plain = start("plain", kind=Plain).handles["plain"]
    pool = start("a")
    pool.add("plain", plain)
    with session_of(pool) as session:
        report = session.push()
        assert len(report.workers) == 2
        assert "reset" in ask(plain, "calls")
        assert {one.worker for one in pool.generate(PROMPTS)} == {str(pid_of(pool.handles["a"]))}
    with (
        session_of(pool, transport="ray") as session,
        pytest.raises(TransportError, match="actor plain has no method `deliver`"),
    ):
        session.push()


def test_a_call_that_an_actor_does_not_have_is_a_transport_error(start: Any):
    client = RayActorClient(start("plain", kind=Plain).handles["plain"], "plain", 5.0)
    with pytest.raises(TransportError, match="actor plain cannot be asked nothing"):
        client._call("nothing")
    with pytest.raises(TransportError, match="cannot be asked start_weight_update: too many"):
        client._call("start_weight_update", 1, 2)


# ---- trainers that hold parts


@pytest.fixture
def hold() -> Iterator[Any]:
    """`hold(weights)`: an actor that does."""
    import ray

    handles: list[Any] = []

    def run(weights: Any = None, **options: Any) -> Any:
        handles.append(ray.remote(**{"num_cpus": 0, **options})(Holder).remote(weights))
        return handles[-1]

    yield run
    for handle in handles:
        ray.kill(handle)


def test_a_source_of_parts_yields_the_bits_that_each_holds(hold: Any):
    torch.manual_seed(0)
    own = {"a": torch.randn(5, 3), "c": torch.randn(7).to(torch.bfloat16)}
    other = {
        "b": torch.arange(-2, 2, dtype=torch.int8).view(2, 2),
        "a": own["a"],
        "d": torch.tensor(1.5),
    }
    source = JoinedSource(TensorSource(own), [hold(other)])
    wanted = own | other
    assert [meta.name for meta in source.metadata()] == ["a", "c", "b", "d"]
    found = dict(source.materialize(["d", "a", "b", "c"]))
    assert list(found) == ["d", "a", "b", "c"]
    for name, tensor in found.items():
        assert (tensor.dtype, tensor.shape) == (wanted[name].dtype, wanted[name].shape)
        assert bytes(as_bytes(tensor)) == bytes(as_bytes(wanted[name]))
    assert dict(source.materialize(["c"])).keys() == {"c"}


def test_a_part_that_ray_has_restarted_is_not_mixed_in(hold: Any):
    """It holds what it was made with, and the others what they have trained since."""
    import ray

    other = hold({"b": torch.zeros(4)}, max_restarts=1, max_task_retries=-1)
    source = JoinedSource(TensorSource({"a": torch.zeros(3)}), [other])
    source.metadata()
    source.metadata()
    ray.kill(other, no_restart=False)
    with pytest.raises(PeerLostError, match="was restarted by Ray"):
        wait_until(lambda: source.metadata() is None, 60)
    JoinedSource(TensorSource({"a": torch.zeros(3)}), [other]).metadata()


def test_parts_that_do_not_fit_are_named(hold: Any):
    import ray

    own = TensorSource({"a": torch.zeros(3)})
    with pytest.raises(
        CoverageError, match=r"a is float32 \(3,\) on one .* float32 \(4,\) on Actor"
    ):
        JoinedSource(own, [hold({"a": torch.zeros(4)})]).metadata()
    with pytest.raises(ConfigError, match="holds no part; call hold"):
        JoinedSource(own, [hold()]).metadata()
    busy = hold({"b": torch.zeros(4)})
    busy.sleep.remote(5.0)
    with pytest.raises(TransportTimeout, match="did not say what it holds within 1 s"):
        JoinedSource(own, [busy], 1.0).metadata()
    dead = hold({"b": torch.zeros(4)})
    source = JoinedSource(own, [dead])
    source.metadata()
    ray.kill(dead)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(dead.sleep.remote(30.0))  # `kill` only asks for it
    with pytest.raises(PeerLostError, match="which holds a part of the weights, was lost"):
        list(source.materialize(["b"]))


# ---- what cannot be right


def test_options_that_ray_refuses_are_not_taken_for_a_name(start: Any):
    with pytest.raises(ConfigError, match=r"Ray refuses the actor options .*num_cpus.*`options`"):
        start_actor("x", {}, options={"num_cpus": -1})


@pytest.mark.parametrize("section", ["trainer", "rollout"])
@pytest.mark.parametrize("wrong", [{"num_cpu": 2}, {"num_cpus": "two"}])
def test_options_of_a_runs_actors_that_ray_refuses(section: str, wrong: Any):
    from rich.console import Console

    run = TrainConfig.of(
        model={"path": "m"},
        data={"path": "d"},
        reward="exact_match",
        output_dir="o",
        rollout={"mode": "ray"},
        ray={section: wrong},
    )
    with pytest.raises(ConfigError, match=f"Ray refuses the actor options.*ray.{section}"):
        train_on_ray(run, Display(Console(quiet=True)), resume=False, verbose=False)


def test_actors_that_would_sleep_are_refused_before_they_are_started():
    from trl.generation import vllm_generation

    from qerl_sync.integrations.ray.trl import PoolSyncCallback

    with PoolSyncCallback().connecting(), pytest.raises(ConfigError, match="do not sleep"):
        vllm_generation.LLM(model="m", enable_sleep_mode=True)


def test_the_object_store_of_nodes_that_do_not_matter_may_be_small():
    with pytest.raises(ConfigError, match="the chunks in flight need"):
        require_object_store(400 << 20)
    require_object_store(400 << 20, nodes={"another"})


def test_an_object_store_too_small_is_told_before_an_engine_is_started():
    from rich.console import Console
    from trl.generation import vllm_generation

    from qerl_sync.integrations.ray.trl import PoolSyncCallback

    sync = {"transport": "ray", "chunk_bytes": "64MiB", "chunks_in_flight": 2}
    words = "object store of node .* has 100.0 MiB, and the chunks in flight need 128.0 MiB"
    run = TrainConfig.of(
        model={"path": "m"},
        data={"path": "d"},
        reward="exact_match",
        output_dir="o",
        rollout={"mode": "ray"},
        sync=sync,
    )
    with pytest.raises(ConfigError, match=words):
        train_on_ray(run, Display(Console(quiet=True)), resume=False, verbose=False)
    with PoolSyncCallback(**sync).connecting(), pytest.raises(ConfigError, match=words):
        vllm_generation.LLM(model="m")


def test_nobody_asks_for_room_that_chunks_do_not_take():
    import ray

    nodes = [node["NodeID"] for node in ray.nodes()]
    for sync in (
        {"transport": "auto"},
        {"transport": "shm"},
        {"transport": "ray", "chunk_bytes": 1},
    ):
        require_room_for_chunks(SyncConfig.of(**sync), nodes)
    with pytest.raises(ConfigError, match="need 128"):
        require_room_for_chunks(SyncConfig.of(transport="auto"), [*nodes, "another"])


# ---- the display


def drawn_at_a_terminal(remote: Display, here: Display, terminal: Any) -> str:
    """What a run writes that finishes a phase and shows one step of a training."""
    with remote.phase("doing", "done"):
        pass
    with remote.steps("training", "trained") as steps:
        steps.advance(1, 2)
        steps.note(1, 2, "reward 0.50")
    assert show(terminal, here)
    return here.console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_the_trainer_shows_appears_at_the_terminal(is_terminal: bool):
    import io

    import ray
    from rich.console import Console

    terminal = start_terminal(ray)
    ray.get(terminal.__ray_ready__.remote())  # `show` does not wait long for it
    here = Display(Console(file=io.StringIO(), force_terminal=is_terminal, width=90))
    remote = remote_display(terminal, console_of(here))
    text = drawn_at_a_terminal(remote, here, terminal)
    assert "done" in text
    assert "trained" in text
    assert ("training 1/2 reward 0.50" in text) is not is_terminal
    assert ("\x1b[?25h" in text) is is_terminal  # the bar has given the cursor back
    assert not remote.asked_to_stop()
    ray.get(terminal.stop.remote())
    assert remote.asked_to_stop()
    ray.kill(terminal)


def test_a_run_goes_on_without_its_display():
    import io

    import ray
    from rich.console import Console

    terminal = start_terminal(ray)
    ray.get(terminal.__ray_ready__.remote())  # `show` does not wait long for it
    here = Display(Console(file=io.StringIO()))
    remote = remote_display(terminal, console_of(here))
    with remote.phase("doing", "done"):
        ray.kill(terminal)
    with remote.steps("training", "trained") as steps:
        steps.advance(1, 2)
        assert not remote.asked_to_stop()
    assert not show(terminal, here)
    assert "the run goes on without being shown" in here.console.file.getvalue()  # type: ignore[attr-defined]
