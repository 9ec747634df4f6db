"""LoRA adapters in engines of other processes, served to requests that name none."""

from __future__ import annotations

import pytest
from support.adapters import make_policy, step
from support.models import make_model, save_model
from support.remote import Async, OwnProcess, Server, TensorParallel, gap, session

from qerl_sync import AdapterSource, ConfigError, SyncConfig, SyncError, SyncSession, noise_of
from qerl_sync.build import remote_transport
from qerl_sync.errors import LoadError
from qerl_sync.sources.hf import probe_of
from qerl_sync.verify.probe_prompt import largest_gap

pytestmark = pytest.mark.vllm

EXACT = 1e-5
KINDS = {
    "own process": OwnProcess,
    "async": Async,
    "server": Server,
    "tensor parallel": TensorParallel,
}


@pytest.fixture(scope="module")
def lora_engine(tmp_path_factory):
    """Engines that begin on other base weights than the policies'."""
    started = {}

    def get(name):
        if name not in started:
            kind = KINDS[name]
            # Without its constructor, which compares weights by names that LoRA layers change.
            engine = started[name] = kind.__new__(kind)
            engine.arguments = {**kind.arguments, "enable_lora": True, "max_lora_rank": 8}
            path = save_model(make_model("dense", 1), tmp_path_factory.mktemp("lora") / "0")
            engine.paths = {0: path}
            engine.start(path)
        return started[name]

    yield get
    for one in started.values():
        one.close()


def gap_to(engine, policy):
    answers = zip(engine.prompts, engine.generate(), strict=True)
    return max(gap(policy, prompt, answer) for prompt, answer in answers)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("name", KINDS)
def test_only_the_adapter_travels_and_every_request_gets_it(lora_engine, name, transport):
    if transport == "tcp" and name != "own process":
        pytest.skip("what carries the bytes does not depend on the engine")
    engine = lora_engine(name)
    policy = make_policy(seed=3)
    adapter = AdapterSource(policy).adapter()
    options = {"transport": transport, "chunk_bytes": "16KiB", "verify": "checksum"}
    with session(engine, AdapterSource(policy), **options) as sync:
        for number in (1, 2, 3):
            step(policy, number)
            assert gap_to(engine, policy) > 0.1, "the engine has another adapter"
            report = sync.push(number)
            assert gap_to(engine, policy) < EXACT
        assert report.sent_bytes == adapter.nbytes
        assert report.num_chunks > 1


@pytest.mark.parametrize("name", KINDS)
def test_all_workers_get_the_same_noise(lora_engine, name):
    engine = lora_engine(name)
    policy = make_policy(seed=3)
    probe = probe_of(policy)
    options = {"noise": {"preset": "section-4.1", "intervals": 2, "steps": 2}}
    with session(engine, AdapterSource(policy), **options, verify="checksum") as sync:
        for step in (0, 1):
            report = sync.push(step)
            asked = sync._transport.prompt_logprobs(probe.token_ids)
            assert largest_gap(probe.noisy(probe.token_ids, noise_of(report)), asked) < EXACT
        assert report.noise["sigma"] == 5e-2
        assert largest_gap(probe.logprobs(probe.token_ids), asked) > 1e-3


def test_a_trainer_that_fails_in_the_middle_leaves_the_old_adapter(lora_engine):
    engine = lora_engine("own process")
    policy = make_policy(seed=4)

    class Cut(AdapterSource):
        cut = False

        def materialize(self, names):
            yield from super().materialize(names)
            if self.cut:
                raise ConnectionResetError("peer gone")

    source = Cut(policy)
    with session(engine, source, transport="shm", chunk_bytes="16KiB") as sync:
        sync.push(1)
        before = engine.generate()
        source.cut = True
        step(policy, 5)
        with pytest.raises((ConnectionResetError, SyncError), match="peer gone"):
            sync.push(2)
        assert engine.generate() == before, "it goes on without another sync"
        source.cut = False
        assert not sync.push(3).lora["base"]
        assert gap_to(engine, policy) < EXACT


def test_a_rank_that_fails_at_the_commit_does_not_go_on_beside_others_with_the_new_adapter(
    lora_engine,
):
    engine = lora_engine("tensor parallel")
    policy = make_policy(seed=4)
    with session(engine, AdapterSource(policy)) as sync:
        version = sync.push(1).version
        step(policy, 5)
        engine.rpc("fail_to_activate", 1)
        with pytest.raises(LoadError, match="no slot"):
            sync.push(2)
        new, old = engine.rpc("sync_state")
        assert (new["version"], old["version"]) == (version + 1, version)
        assert old["poisoned"]
        sync._source.materialize = lambda names: 1 / 0  # before anything is touched
        with pytest.raises(ZeroDivisionError):
            sync.push(3)
        with pytest.raises(SyncError):
            engine.generate()
        del sync._source.materialize
        sync.push(4)
    assert gap_to(engine, policy) < EXACT


def test_what_the_engine_cannot_serve_is_refused_at_construction(lora_engine, remote):
    for engine, policy, value in (
        (lora_engine("own process"), make_policy(r=16), 16),
        (remote("own process"), make_policy(), None),
    ):
        config = SyncConfig.of(timeout_seconds=60)
        transport = remote_transport(config, engine.client())
        with pytest.raises(ConfigError) as caught:
            SyncSession(AdapterSource(policy), transport, config)
        assert getattr(caught.value, "rank", None) == value
        transport.close()
