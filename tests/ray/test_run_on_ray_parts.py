"""Parts of runs on Ray that need neither Ray nor an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import DataLoaderShard

from qerl_sync import AsyncRolloutActor, ConfigError, PoisonedError, RolloutActor, TransportError
from qerl_sync.config import TrainConfig
from qerl_sync.integrations.ray.actors import Rollout, with_defaults, world_size
from qerl_sync.integrations.ray.llm import Announcer, PooledLLM
from qerl_sync.training.arguments import pool_arguments
from qerl_sync.training.on_ray import with_absolute_paths

# ---- batches that are announced


def epoch(count: int) -> DataLoaderShard:
    return DataLoaderShard(list(range(count)), batch_size=1, collate_fn=lambda rows: rows[0])


@pytest.mark.parametrize("skipped", [0, 2])
def test_batches_are_announced_ahead_also_after_a_resume_has_skipped_some(skipped: int):
    reported: list[int] = []
    announcer = Announcer(reported.append, ahead=1, every=1)
    loader = skip_first_batches(epoch(6), skipped) if skipped else epoch(6)
    batches = iter(loader)
    seen = []
    for _ in range(6 - skipped):
        seen.append(next(announcer.of(batches)))  # as the trainer asks, once for each step
        assert reported == list(range(skipped, min(seen[-1] + 2, 6)))
    assert seen == list(range(skipped, 6))


def test_of_batches_that_share_completions_one_is_announced_and_each_epoch_begins_anew():
    reported: list[int] = []
    announcer = Announcer(reported.append, ahead=1, every=2)
    for _ in range(2):
        assert list(announcer.of(iter(epoch(4)))) == [0, 1, 2, 3]
    assert reported == [0, 2, 0, 2]


class Pool:
    """What PooledLLM asks of a pool."""

    newest_version = 1

    def __init__(self) -> None:
        self.submitted: list[Any] = []
        self.down = 0
        self.logprobs = [0.0]

    def submit(self, prompts: Any, sampling: Any) -> Any:
        if self.down:
            raise TransportError("nobody is left")
        self.submitted.append(prompts)
        rollouts = [Rollout(ids, [1], self.logprobs, "", 1, "w", 1) for ids in prompts]
        return SimpleNamespace(result=lambda oldest: rollouts)


def ask(llm: PooledLLM, *ids: int) -> list[Any]:
    return llm.generate([{"prompt_token_ids": [one]} for one in ids], None)


def test_announcements_of_batches_that_were_skipped_do_not_stop_those_that_come():
    pool = Pool()
    llm = PooledLLM(pool, max_staleness=1)  # type: ignore[arg-type]
    for number in range(4):
        llm.expect([[number]])
    ask(llm, 2)
    assert pool.submitted == [[[2]], [[3]]]
    ask(llm, 3)
    assert pool.submitted == [[[2]], [[3]]]
    assert not llm._coming
    assert not llm._begun


def test_the_loss_of_all_workers_is_recovered_from_a_few_times():
    pool = Pool()
    llm = PooledLLM(pool)  # type: ignore[arg-type]
    pool.down = 2
    with pytest.raises(TransportError, match="nobody is left"):
        ask(llm, 1)

    def recover() -> None:
        pool.down -= 1

    llm.recover = recover
    ask(llm, 1)
    pool.down = 100
    with pytest.raises(TransportError, match="nobody is left"):
        ask(llm, 1)
    assert pool.down > 90


def test_images_go_with_their_prompts_and_are_not_generated_ahead():
    pool = Pool()
    prompts = [
        {"prompt_token_ids": [1], "multi_modal_data": {"image": "one"}},
        {"prompt_token_ids": [2]},
    ]
    PooledLLM(pool).generate(prompts, None)  # type: ignore[arg-type]
    assert pool.submitted == [[prompts[0], [2]]]
    with pytest.raises(ConfigError) as raised:
        PooledLLM(pool, max_staleness=1).generate(prompts, None)  # type: ignore[arg-type]
    assert raised.value.extra == ("multi_modal_data",)


def test_completions_without_log_probabilities_have_none_as_vllms():
    """IW-OPD asks for none with one of its objectives."""
    pool = Pool()
    pool.logprobs = []
    assert ask(PooledLLM(pool), 1)[0].outputs[0].logprobs is None  # type: ignore[arg-type]
    pool.logprobs = [0.5]
    (output,) = ask(PooledLLM(pool), 1)[0].outputs  # type: ignore[arg-type]
    assert output.logprobs[0][1].logprob == 0.5


# ---- engines


def test_ranks_are_processes_of_the_actor_unless_the_user_says_otherwise():
    assert "distributed_executor_backend" not in with_defaults({"tensor_parallel_size": 1})
    assert with_defaults({"tensor_parallel_size": 2})["distributed_executor_backend"] == "mp"
    several = {"pipeline_parallel_size": 2, "distributed_executor_backend": "ray"}
    assert with_defaults(several)["distributed_executor_backend"] == "ray"
    assert world_size({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}) == 4


class Client:
    """The control plane of an engine that is not there."""

    def __init__(self, in_process: bool) -> None:
        self.in_process = in_process
        self.calls: list[str] = []

    def pause(self, mode: str) -> None:
        self.calls.append(mode)

    def resume(self) -> None: ...


class Failing(RolloutActor):
    in_process = True

    def _start(self, engine: Any) -> Any:
        def generate(*args: Any, **options: Any) -> Any:
            raise RuntimeError("cannot")

        return SimpleNamespace(generate=generate)

    def _control(self, llm: Any) -> Any:
        return Client(self.in_process)


class FailingApart(Failing):
    in_process = False


@pytest.mark.vllm
@pytest.mark.parametrize(("kind", "calls"), [(Failing, ["abort"]), (FailingApart, [])])
def test_a_failed_call_pauses_no_engine_in_a_process_of_its_own(kind: Any, calls: list[str]):
    actor = kind({}, serve_initial_weights=True)
    with pytest.raises(RuntimeError, match="cannot"):
        actor.generate([[1]])
    assert actor._client.calls == calls


@pytest.mark.parametrize("kind", [Failing, FailingApart])
def test_nothing_is_generated_between_two_calls_of_a_sync(kind: Any):
    actor = kind({}, serve_initial_weights=True)
    actor.pause("keep")
    with pytest.raises(PoisonedError, match="a sync is under way, or one has failed"):
        actor.generate([[1]])
    actor.resume()
    actor._require(0)


# ---- the configuration


def test_what_is_relative_is_so_to_where_the_run_was_started(tmp_path: Any, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = TrainConfig.of(
        model={"path": "model"}, data={"path": "hub/name"}, reward="exact_match", output_dir="runs"
    )
    found = with_absolute_paths(config)
    assert found.model.path == str(tmp_path / "model")
    assert found.data.path == "hub/name"
    assert found.output_dir == str(tmp_path / "runs")


def run_with(**rollout: Any) -> TrainConfig:
    return TrainConfig.of(
        model={"path": "m"},
        data={"path": "d"},
        reward="exact_match",
        output_dir="o",
        rollout={"mode": "ray", **rollout},
    )


def test_the_timeout_of_generating_reaches_the_pool():
    assert pool_arguments(run_with(generate_timeout_seconds=5))["generate_seconds"] == 5


def test_which_actors_a_run_starts():
    asked = {"async_engine": True, "engine": {}}
    ranks = {"async_engine": False, "engine": {"tensor_parallel_size": 2}}
    for rollout, kind, apart in (
        ({}, RolloutActor, None),
        (ranks, RolloutActor, "1"),
        (asked, AsyncRolloutActor, "1"),
    ):
        found = pool_arguments(run_with(**rollout))
        assert found["actor"] is kind
        if apart:
            assert found["environment"]["VLLM_ENABLE_V1_MULTIPROCESSING"] == apart
