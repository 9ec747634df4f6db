"""A representative part of `scripts/faults`, its random schedules, and its tables."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager

import pytest
import torch
from support.models import CONFIGS, checkpoint_tensors, make_model, save_model

from faults import suite
from faults.__main__ import main
from faults.cases import all_cases
from faults.oracle import VersionWatch
from faults.outcomes import OURS, STOCK, Outcome
from faults.spoilers import changed, reusing_its_buffer, transposed, victim_of
from faults.suite import (
    CASE_SECONDS,
    SPECS,
    STOCK_SECONDS,
    Spec,
    chosen_specs,
    run_random,
    run_suite,
)
from faults.tables import complaints, fault_page
from faults.triggers import PHASES, FaultySource, Trigger
from qerl_sync import ConfigError, PoisonedError, SyncError

# Of each group something; all of them take minutes.
IN_PROCESS = [
    "missing decoder layer",
    "int64 for a float parameter",
    "doubled in the stream",
    "NaN",
    "beyond the range of the engine's dtype",
    "receive buffer used again",
    "exception: several layers open",
    "exception: last tensor, rolled back",
    "exception in a loader",
    "trainer fails before finish",
    "doubled start",
    "finish without start",
]
OWN_PROCESS = [
    "NaN, several layers open",
    "receive buffer used again",
    "no room for shared memory",
    "trainer killed between chunks",
    "connection cut between chunks",
    "worker stopped between chunks",
    "two trainers at once",
    "bit flipped on the network",
    "second trainer in another process",
    "trainer killed in a chunk, its forked child alive",
    "worker killed in a chunk",
]
DATA_PARALLEL = ["missing tensor", "NaN", "trainer killed between chunks"]
MULTIMODAL = [
    "only the vision tower changes",
    "exception in the vision tower, rolled back",
    "encoder cache is not emptied",
]


def outcomes(tmp_path, spec: str, cases: list[str]) -> dict[str, Outcome]:
    found = run_suite([Spec.parse(spec)], cases, tmp_path / "engine.log")
    return {outcome.case: outcome for outcome in found}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)  # an engine anew after each case that ends its process
@pytest.mark.parametrize(
    ("spec", "cases"),
    [
        ("in process/moe/stock", IN_PROCESS),
        ("own process/dense/stock", OWN_PROCESS),
        ("data parallel/dense/stock", DATA_PARALLEL),
        ("multimodal/vision/stock", MULTIMODAL),
    ],
)
def test_faults_end_as_the_contract_says(tmp_path, spec, cases):
    found = outcomes(tmp_path, spec, cases)
    assert sorted(found) == sorted(cases)
    assert complaints(list(found.values())) == []


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)  # two engines, one after the other
def test_stock_vllm_is_broken_in_the_same_way_beside(tmp_path):
    spec = Spec.parse("in process/tied/stock")
    found = run_suite([spec], ["missing tensor"], tmp_path / "engine.log", stock=True)
    assert [(o.by, o.ended) for o in found] == [(OURS, "old"), (STOCK, "wrong weights")]


@pytest.mark.vllm
@pytest.mark.slow
def test_random_schedules_keep_every_promise(tmp_path):
    found = run_random(Spec("in process", "tied"), 10, 0, tmp_path / "engine.log")
    assert found["failure"] == ""
    assert found["schedules"] >= 10 <= found["faults"]


def outcome(**reported) -> Outcome:
    return Outcome(
        **{
            "spec": "server/dense/stock",
            "case": "NaN",
            "ended": "poisoned",
            "expected": ("poisoned",),
            "healed": True,
            **reported,
        }
    )


def test_an_outcome_is_ok_only_if_all_of_it_is():
    assert outcome().ok
    assert not outcome(ended="new").ok
    assert not outcome(healed=None).ok
    assert not outcome(leaks=["/dev/shm/x"]).ok
    assert not outcome(version_faults=["the version of worker 0 went back: 2 -> 1"]).ok
    assert not outcome(detection_seconds=2.1).ok
    assert outcome(detection_seconds=2.1, allowed_seconds=5.0).ok
    assert outcome().to_json()["ok"] is True


def test_complaints_say_what_was_promised_and_what_was_found():
    (line,) = complaints([outcome(), outcome(ended="hang", healed=False, leaks=["one"])])
    assert "server/dense/stock: NaN: hang (allowed: poisoned); leaks one" in line
    assert "not exactly right" in line


def test_the_page_has_a_row_for_each_case_and_a_column_for_each_engine():
    page = fault_page(
        [
            outcome(),
            outcome(spec="in process/dense/stock"),
            outcome(spec="in process/moe/stock", ended="old"),
            outcome(spec="in process/dense/stock", by="stock vLLM", ended="wrong weights"),
        ],
        "vLLM 0",
    )
    assert "| fault | server | in process | stock vLLM | its next full reload |" in page
    assert "| NaN | poisoned | poisoned (1), old (1) | wrong weights | exact |" in page
    assert "| poisoned | refuses to generate, and says why, until the next full sync |" in page
    assert "vLLM 0." in page


def test_runs_are_put_together(tmp_path, capsys):
    parts = [outcome(), outcome(spec="in process/dense/stock", case="infinity", ended="old")]
    files = [tmp_path / f"{i}.json" for i in range(2)]
    for path, part in zip(files, parts, strict=True):
        path.write_text(json.dumps({"versions": "vLLM 0.31.0", "outcomes": [part.to_json()]}))
    page = tmp_path / "page.md"
    status = main(["--read", *map(str, files), "--docs", str(page)])
    assert status == 1
    assert "in process/dense/stock: infinity: old (allowed: poisoned)" in capsys.readouterr().out
    assert "| infinity | – | old |" in page.read_text()
    assert "vLLM 0.31.0" in page.read_text()

    files[1].write_text(json.dumps({"versions": "vLLM 0.32.0", "outcomes": []}))
    assert main(["--read", *map(str, files)]) == 2
    assert "runs of several versions: vLLM 0.31.0; vLLM 0.32.0" in capsys.readouterr().err

    files[1].write_text("")  # as a run leaves it that was killed
    assert main(["--read", *map(str, files)]) == 2
    assert f"{files[1]} does not hold" in capsys.readouterr().err


def test_the_page_counts_what_was_noticed_in_time():
    page = fault_page(
        [
            outcome(detection_seconds=1.5),
            outcome(case="worker stopped", detection_seconds=3.1, allowed_seconds=5.0),
            outcome(case="late", detection_seconds=2.5),
            outcome(case="nothing to notice"),
        ],
        "vLLM 0",
    )
    assert "Of 3 faults whose detection was timed, 2 were noticed within their limit" in page
    assert "The slowest for its limit took 2.50 s of 2 s: late (server/dense/stock)." in page


@pytest.mark.parametrize("hangs", [False, True])
def test_a_case_hangs_only_if_much_more_time_does_not_help(tmp_path, monkeypatch, hangs):
    waited = []

    @contextmanager
    def hosted(spec, log, **reported):
        said = iter(["NaN", outcome()])

        def hear(seconds):
            waited.append(seconds)
            one = next(said, None)
            if one is None:
                raise SyncError("its end")
            if one != "NaN" and (hangs or seconds < 10 * STOCK_SECONDS):
                raise TimeoutError
            return one

        yield hear

    monkeypatch.setattr(suite, "hosted", hosted)
    found = list(run_suite([Spec("in process", "dense")], ["NaN"], tmp_path / "log", stock=True))
    assert [one.ended for one in found] == ["hang" if hangs else "poisoned"] * 2
    assert max(waited) == 10 * CASE_SECONDS


@pytest.mark.slow  # its process imports torch
def test_what_ends_a_process_at_its_start_is_shown(tmp_path):
    log = tmp_path / "engine.log"
    with (
        pytest.raises(SyncError, match="KeyError: 'none'"),
        suite.hosted(Spec("none", "dense"), log),
    ):
        pass
    assert "Traceback" in log.read_text()


class Versions:
    """An engine whose ranks have committed `held`."""

    def __init__(self, *held: int) -> None:
        self.held = list(held)

    def state(self) -> list[dict[str, int]]:
        return [{"version": version} for version in self.held]


def test_versions_that_go_back_or_stand_still_are_found():
    engine = Versions(4, 4)
    watch = VersionWatch(engine)
    watch.look()
    engine.held = [5, 5]
    watch.look_after_sync()
    assert watch.found == []
    engine.held = [5, 1]
    watch.look()
    assert watch.found == ["the version of worker 1 went back: 5 -> 1"]
    engine.held = [6, 1]
    watch.look_after_sync()
    assert watch.found[1:] == [
        "the version of worker 1 did not rise with a good sync: 1 -> 1",
        "ranks are on versions [6, 1] after a good sync",
    ]


@pytest.mark.parametrize("kind", sorted({spec.model for spec in SPECS} & set(CONFIGS)))
def test_a_wrong_shape_is_another_shape(tmp_path, kind):
    tensors = checkpoint_tensors(save_model(make_model(kind, 0), tmp_path))
    victim = victim_of(list(tensors))
    spoiled = dict(changed(transposed)(list(tensors.items()), victim))
    assert spoiled[victim].shape != tensors[victim].shape


def test_a_square_matrix_is_no_victim():
    with pytest.raises(AssertionError, match=r"shape \[2, 2\] keeps its shape"):
        transposed(torch.ones(2, 2))


def test_trainers_and_workers_are_stopped_and_killed_in_every_phase():
    for what in ("trainer stopped", "worker stopped", "trainer killed", "worker killed"):
        assert {f"{what} {phase}" for phase in PHASES} <= set(all_cases())


def test_every_case_suits_some_engine_of_the_suite():
    for case in all_cases().values():
        assert any(case.suits(spec) for spec in SPECS), case.name


def test_engines_are_chosen_by_name_or_in_full():
    assert {spec.engine for spec in chosen_specs(["server"])} == {"server"}
    assert chosen_specs(["own process/bias/stock"]) == [Spec("own process", "bias")]
    with pytest.raises(ConfigError, match=r"no engine svr; choose from in process, own process"):
        chosen_specs(["svr"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("own process/dense/plain", r"own process/dense/plain: plain .*'in process/dense/plain'"),
        ("own process/denser/stock", "there is no model 'denser'; choose from"),
        ("in process/dense/stuck", "there is no kernels 'stuck'; choose from stock, plain"),
        ("svr/dense/stock", "there is no engine 'svr'; choose from in process"),
        ("multimodal/dense/stock", "choose multimodal/vision/stock"),
        ("server/vision/stock", "choose multimodal/vision/stock"),
    ],
)
def test_what_no_engine_can_be_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        chosen_specs([text])


def test_a_case_that_does_not_exist_is_named(capsys):
    assert main(["--engine", "server", "--case", "nothing"]) == 2
    assert "no case is called nothing" in capsys.readouterr().err


def test_a_buffer_that_is_used_again_has_one_address():
    held = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    seen = list(reusing_its_buffer(iter(held.items()), Trigger()))
    assert len({tensor.data_ptr() for _, tensor in seen}) == 1
    assert seen[0][1].tolist() == [0, 0, 0], "it was not overwritten"


def test_a_trigger_fires_once_and_knows_when():
    fired = []
    trigger = Trigger("in a chunk", lambda: fired.append(1))
    source = FaultySource({"a": torch.ones(1), "b": torch.ones(1)}, trigger)
    source.metadata()
    list(source.materialize(["a"]))
    assert trigger.fired_at is None
    list(source.materialize(["b"]))
    list(source.materialize(["b"]))
    assert fired == [1]
    assert trigger.fired_at is not None


class Engine:
    def add_request(self):
        return "taken"


class FakeLLM:
    def __init__(self):
        self.llm_engine = Engine()


def test_a_refusing_llm_says_why_and_takes_requests_again():
    from qerl_sync.engines.llm import LLMClient

    llm = FakeLLM()
    client = LLMClient(llm)
    client.refuse("a sync failed: no room")
    with pytest.raises(PoisonedError, match=r"a sync failed: no room.*session\.push"):
        llm.llm_engine.add_request()
    client.admit()
    client.admit()
    assert llm.llm_engine.add_request() == "taken"


class FakeAsyncLLM(FakeLLM):
    def generate(self):
        try:
            return self.llm_engine.add_request()
        except Exception as exc:  # as vLLM's
            raise RuntimeError from exc

    encode = generate


def test_a_refusing_async_llm_says_why_however_it_is_asked():
    from qerl_sync.engines.async_llm import AsyncLLMClient

    llm = FakeAsyncLLM()
    client = AsyncLLMClient(llm, asyncio.new_event_loop())
    client.refuse("a sync failed: no room")
    for ask in (llm.generate, llm.encode, lambda: asyncio.run(llm.add_request())):
        with pytest.raises(PoisonedError, match="a sync failed: no room"):
            ask()
    client.admit()
    client.admit()
    assert llm.generate() == llm.encode() == "taken"
    client.loop.close()
