"""When a sync is begun ahead of TRL's asking, and when that is refused."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from qerl_sync import ConfigError, SyncConfig, SyncSession
from qerl_sync.errors import PlanError
from qerl_sync.integrations.eager import EagerSync, require_eager
from qerl_sync.integrations.ray.trl import PoolSyncCallback
from qerl_sync.session import SyncReport

CPU = torch.device("cpu")


@pytest.fixture
def eager():
    found = EagerSync()
    yield found
    found.close()


def begin(eager, push, step=1):
    eager.begin(push, step=step, clean=False, device=CPU)


def report():
    fields = dict.fromkeys(SyncReport.__dataclass_fields__, 0)
    return SyncReport(**fields | {"seconds": {"total": 0.25}})


@pytest.mark.parametrize("every", [1, 3])
def test_the_next_is_foreseen_from_the_second_on(eager, every):
    foreseen = []
    for step in range(4 * every + 1):
        if eager.is_next(step):
            foreseen.append(step)
        if step % every == 0:
            eager.asked(step)
            eager.asked(step)  # a step may have completions made in several calls
    assert foreseen == [2 * every, 3 * every, 4 * every]


def test_a_training_that_begins_anew_is_learned_anew(eager):
    for step in (4, 5, 0):
        eager.asked(step)
    assert not any(map(eager.is_next, range(9)))
    eager.asked(1)
    assert eager.is_next(2)


def test_concluding_waits_and_says_how_long(eager):
    def push():
        time.sleep(0.2)
        return report()

    begin(eager, push, step=7)
    assert not eager.is_next(7), "one is under way"
    found, step, clean = eager.conclude()
    assert (step, clean) == (7, False)
    assert 0.1 < found.seconds["waited"] < 10
    assert found.seconds["total"] == 0.25
    assert eager.conclude() is None


def test_what_the_sync_raised_is_raised_once(eager):
    def push():
        raise PlanError("no plan")

    begin(eager, push)
    with pytest.raises(PlanError, match="no plan"):
        eager.conclude()
    assert eager.conclude() is None


def test_a_sync_that_an_interrupt_leaves_running_is_waited_for_by_the_next(eager, monkeypatch):
    go = threading.Event()

    def push():
        assert go.wait(60)
        return report()

    begin(eager, push, step=3)

    def interrupted():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(eager._begun[0], "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            eager.conclude()
    assert not eager.is_next(4), "it is still under way"
    go.set()
    assert eager.conclude()[1] == 3


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"num_processes": 2}, "2 processes"),
        ({"sleeps": True}, "vllm_enable_sleep_mode"),
        ({"deepspeed": True}, "within the backward pass"),
    ],
)
def test_what_cannot_run_beside_its_trainer_is_refused(found, told):
    alone = {"num_processes": 1, "sleeps": False, "deepspeed": False}
    require_eager(**alone)
    with pytest.raises(ConfigError, match=told) as caught:
        require_eager(**{**alone, **found})
    assert "choose sync.when: lazy" in str(caught.value)


def test_a_sync_that_computes_with_the_trainers_model_is_refused():
    with pytest.raises(ConfigError, match="when: `eager` syncs beside the trainer"):
        SyncConfig.of(when="eager", verify="full")


def test_actors_that_generate_beside_the_trainer_are_refused():
    with pytest.raises(ConfigError, match="with max_staleness=1 actors generate beside"):
        PoolSyncCallback(when="eager", max_staleness=1)


def test_a_session_refuses_what_it_does_not_decide():
    source = SimpleNamespace(stamps_content=True, lora=None)
    with pytest.raises(ConfigError, match=r"sync\.when: eager is for a TRL trainer"):
        SyncSession(source, SimpleNamespace(), SyncConfig.of(when="eager"))
