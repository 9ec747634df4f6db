"""The control plane of engines: what is asked of them, and what each way of failing becomes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from support.engines import generate, start_engine
from support.models import make_model, save_model
from support.remote import engine_environment
from support.servers import ENGINE, answering, wait_until

from qerl_sync.engines.async_llm import AsyncLLMClient
from qerl_sync.engines.base import complaint
from qerl_sync.engines.http import HTTPClient
from qerl_sync.engines.llm import LLMClient
from qerl_sync.errors import (
    CompatError,
    ConfigError,
    PeerLostError,
    TransportError,
    TransportTimeout,
)
from qerl_sync.serving.processes import descendants, is_resource_tracker

METHODS = {
    "init_weight_transfer_engine": [{"token": "t"}],
    "start_weight_update": [],
    "update_weights": [{"chunk": 3}],
    "finish_weight_update": [],
}


@pytest.fixture
def server():
    with answering() as (url, answers):
        yield url, answers


class TestHTTP:
    @pytest.fixture
    def answers(self, server):
        return server[1]

    @pytest.fixture
    def client(self, server):
        return HTTPClient(server[0] + "/", timeout_seconds=20)

    def drive(self, client):
        for method, arguments in METHODS.items():
            getattr(client, method)(*arguments)
        client.finish_weight_update("7")

    def test_an_update(self, client, answers):
        answers.by_route = {f"POST /{method}": (200, "{}") for method in METHODS}
        self.drive(client)
        assert answers.asked == [
            ("POST /init_weight_transfer_engine", {"init_info": {"token": "t"}}),
            ("POST /start_weight_update", None),
            ("POST /update_weights", {"update_info": {"chunk": 3}}),
            ("POST /finish_weight_update", None),
            ("POST /finish_weight_update", {"weight_version": "7"}),
        ]

    @pytest.mark.slow
    def test_vllms_own_client_asks_the_same(self, client, answers, server):
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

        answers.by_route = {f"POST /{method}": (200, "{}") for method in METHODS}
        self.drive(client)
        ours = list(answers.asked)
        answers.asked.clear()
        self.drive(HTTPVLLMWeightSyncClient(server[0]))
        assert answers.asked == ours

    def test_pausing_leaves_the_caches_to_their_own_method(self, client, answers):
        answers.by_route = {"POST /pause": (200, "{}"), "POST /resume": (200, "{}")}
        client.pause("keep")
        client.resume()
        assert answers.asked == [
            ("POST /pause?mode=keep&clear_cache=false", None),
            ("POST /resume", None),
        ]

    @pytest.mark.parametrize("running", [True, False])
    @pytest.mark.parametrize("emptied", [True, False])
    def test_caches(self, running, emptied, client, answers):
        """All of them, also where requests in flight hold on to what they have computed."""
        answers.by_route = {
            "POST /reset_prefix_cache": (200, json.dumps({"success": emptied})),
            "POST /reset_encoder_cache": (200, ""),
            "POST /reset_mm_cache": (200, ""),
        }
        assert client.reset_caches(running=running) is emptied
        given = f"reset_running_requests={str(running).lower()}&reset_external=true"
        assert answers.asked == [
            (f"POST /reset_prefix_cache?{given}", None),
            ("POST /reset_encoder_cache", None),
            ("POST /reset_mm_cache", None),
        ]

    def test_facts(self, client, answers):
        answers.by_route = {
            "GET /weight_info": (200, '{"weight_version": "12"}'),
            "GET /get_world_size": (200, '{"world_size": 4}'),
            "GET /health": (200, ""),
        }
        assert client.weight_version() == "12"
        assert client.world_size() == 4
        assert client.health()
        answers.by_route["GET /health"] = (503, "")
        assert not client.health()

    def test_answers_of_something_else(self, client, answers):
        for body in ("[]", '{"status": "ok"}'):
            answers.by_route = {"GET /get_world_size": (200, body)}
            with pytest.raises(TransportError, match="is no vLLM server"):
                client.world_size()

    def test_an_api_key(self, client, answers, server, monkeypatch):
        """vLLM asks for it below /v1."""
        answers.by_route = {"GET /v1/models": (401, '{"error": "Unauthorized"}')}
        with pytest.raises(TransportError, match="set VLLM_API_KEY"):
            client.prompt_logprobs([1, 2])
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        with pytest.raises(TransportError):
            HTTPClient(server[0]).prompt_logprobs([1, 2])
        authorizations = [one.get("Authorization") for one in answers.headers]
        assert authorizations == [None, "Bearer secret"]

    def test_a_vllm_without_versions(self, client, answers):
        answers.by_route = {
            "GET /weight_info": (404, "{}"),
            "GET /get_world_size": (200, '{"world_size": 4}'),
            "GET /version": (200, '{"version": "0.25.1"}'),
        }
        with pytest.raises(CompatError) as error:
            client.weight_version()
        assert (error.value.missing, error.value.version) == (("/weight_info",), "0.25.1")
        answers.by_route["GET /get_world_size"] = (404, "{}")
        with pytest.raises(TransportError, match="VLLM_SERVER_DEV_MODE=1"):
            client.weight_version()

    WORKER = "Call to collective_rpc method failed: Worker failed with error 'chunk 3 isn't due', "
    WORKER += "please check the stack trace above for the root cause"

    @pytest.mark.parametrize(
        ("status", "body", "words"),
        [
            (404, '{"detail": "Not Found"}', "VLLM_SERVER_DEV_MODE=1"),
            (404, '{"detail": "Not Found"}', "`qerl-sync serve`"),
            (500, json.dumps({"error": {"message": WORKER}}), r"\(500\): chunk 3 isn't due$"),
            (500, '{"error": "Failed to pause"}', "Failed to pause"),
            (500, "Internal Server Error", "Internal Server Error"),
            (500, "", "Internal Server Error"),
            (400, '{"error": {"message": "Missing init_info"}}', r"\(400\): Missing init_info"),
            (302, "", r"\(302\)"),
            (200, "<html>router login</html>", "is no vLLM server: '<html>router login"),
        ],
    )
    def test_refusals(self, status, body, words, client, answers, server):
        answers.by_route = {"POST /start_weight_update": (status, body)}
        with pytest.raises(TransportError, match=words) as raised:
            client.start_weight_update()
        assert "start_weight_update" in str(raised.value)
        assert server[0] in str(raised.value)

    def test_one_that_does_not_answer(self, server, answers):
        answers.hold.clear()
        with pytest.raises(TransportTimeout) as raised:
            HTTPClient(server[0], timeout_seconds=0.3).start_weight_update()
        assert raised.value.__cause__ is not None

    def test_an_update_takes_as_long_as_it_takes(self, server, answers):
        answers.by_route = {"POST /update_weights": (200, "{}")}
        answers.hold.clear()
        threading.Timer(0.8, answers.hold.set).start()
        started = time.monotonic()
        HTTPClient(server[0], timeout_seconds=0.2).update_weights({})
        assert time.monotonic() - started >= 0.7

    def test_one_that_dies_while_asked(self, client, answers):
        answers.drop_connections = True
        with pytest.raises(PeerLostError) as raised:
            client.update_weights({})
        assert raised.value.__cause__ is not None

    def test_one_that_is_not_there(self):
        with answering() as (url, _):
            pass
        with pytest.raises(PeerLostError) as raised:
            HTTPClient(url).start_weight_update()
        assert url in str(raised.value)
        assert raised.value.__cause__ is not None
        assert not HTTPClient(url).health()

    def test_one_whose_name_nobody_knows(self):
        with pytest.raises(PeerLostError):
            HTTPClient("http://no-such-host.invalid:1").start_weight_update()

    def test_no_address(self):
        with pytest.raises(ConfigError):
            HTTPClient("localhost:8000")

    def test_a_proxy_for_the_internet_is_not_asked(self, client, answers, monkeypatch):
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "")
        answers.by_route = {"POST /resume": (200, "{}")}
        client.resume()

    def test_a_trainer_needs_no_vllm_for_it(self, server):
        code = (
            "import sys; from qerl_sync.engines.http import HTTPClient;"
            f"assert not HTTPClient({server[0]!r}).health();"
            "assert not {'vllm', 'torch'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class SlowEngine:
    """What the clients touch of a `LLM` in its own process, or of an `AsyncLLM`."""

    def __init__(self):
        resources = SimpleNamespace(engine_dead=False)
        self.engine_core = SimpleNamespace(resources=resources)
        self.llm_engine = self
        self.resources = resources

    def die(self):
        self.resources.engine_dead = True


class SlowLLM(SlowEngine):
    def update_weights(self, update):
        time.sleep(0.8)

    start_weight_update = get_weight_version = lambda self: time.sleep(0.8)


class SlowAsyncLLM(SlowEngine):
    cancelled = False

    async def update_weights(self, request):
        try:
            await asyncio.sleep(0.8)
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def start_weight_update(self):
        await asyncio.sleep(0.8)


def test_an_engine_without_weight_versions(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.25.1"))
    loop = asyncio.new_event_loop()
    for client in (LLMClient(SlowEngine()), AsyncLLMClient(SlowEngine(), loop)):
        with pytest.raises(CompatError) as error:
            client.weight_version()
        assert (error.value.missing, error.value.version) == (("get_weight_version",), "0.25.1")
    loop.close()


class TestUpdatesTakeAsLongAsTheyTake:
    """And engines that die in one are noticed, which vLLM leaves without an answer."""

    def test_llm(self):
        client = LLMClient(SlowLLM(), timeout_seconds=0.3)
        client.update_weights({})
        with pytest.raises(TransportTimeout):
            client.start_weight_update()

    def test_llm_that_dies(self):
        llm = SlowLLM()
        threading.Timer(0.1, llm.die).start()
        with pytest.raises(PeerLostError):
            LLMClient(llm).update_weights({})

    @pytest.mark.slow
    def test_async(self, loop):
        client = AsyncLLMClient(SlowAsyncLLM(), loop, timeout_seconds=0.3)
        client.update_weights({})
        with pytest.raises(TransportTimeout):
            client.start_weight_update()

    @pytest.mark.slow
    def test_async_that_dies(self, loop):
        engine = SlowAsyncLLM()
        threading.Timer(0.1, engine.die).start()
        with pytest.raises(PeerLostError):
            AsyncLLMClient(engine, loop).update_weights({})
        assert wait_until(lambda: engine.cancelled, 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Call to collective_rpc method failed: no", "no"),
        ("Worker failed with error 'it's\ntwo', please check the stack trace above", "it's\ntwo"),
        ("plain", "plain"),
    ],
)
def test_the_words_of_a_worker_are_taken_out_of_vllms(text, said):
    assert complaint(text) == said


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_model(make_model("dense", 0), tmp_path_factory.mktemp("clients") / "model")


@pytest.fixture(scope="module")
def engines_of_their_own():
    """Engines are started in processes of their own, as vLLM does by default."""
    # A fork of this process, with its threads and engines, could hang.
    with engine_environment(
        {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    ):
        yield


@pytest.mark.vllm
@pytest.mark.slow
class TestLLMInThisProcess:
    def test_pausing_is_harmless(self, subject):
        one = subject("dense")
        client = LLMClient(one.engine)
        assert client.in_process
        for mode in ("keep", "wait", "abort"):
            client.pause(mode)
            assert one.generates_as(0)
            client.resume()
        assert client.reset_caches(running=False)
        assert client.world_size() == 1
        assert client.weight_version()

    def test_refusals(self, subject):
        client = LLMClient(subject("dense").engine)
        with pytest.raises(TransportError, match="finish_weight_update called without") as it:
            client.finish_weight_update()
        assert it.value.__cause__ is not None


@pytest.fixture(scope="module")
def own_engine(path, engines_of_their_own):
    before = set(descendants(os.getpid()))
    engine = start_engine(path, weight_transfer_config={"backend": "ipc"})
    started = set(descendants(os.getpid())) - before
    # Not the tracker: it is this process's own, and stays.
    engine.processes = [pid for pid in started if not is_resource_tracker(pid)]
    yield engine
    core = engine.llm_engine.engine_core
    core.shutdown()
    # What waits for an engine that was killed would wait for ever, its sockets with it.
    for unanswered in core.utility_results.values():
        unanswered.cancel()
    core.ctx.destroy(linger=0)


@pytest.mark.vllm
@pytest.mark.slow
class TestLLMInItsOwnProcess:
    @pytest.fixture
    def engine(self, own_engine):
        return own_engine

    @pytest.fixture
    def client(self, engine):
        return LLMClient(engine, timeout_seconds=30)

    def test_an_update_that_sends_nothing(self, client, engine):
        assert not client.in_process
        expected = generate(engine)
        client.pause("keep")
        client.start_weight_update()
        client.finish_weight_update("3")
        assert client.reset_caches(running=True)
        client.resume()
        assert client.weight_version() == "3"
        assert client.world_size() == 1
        assert generate(engine) == expected

    def test_refusals(self, client):
        with pytest.raises(TransportError, match="start_weight_update must be") as raised:
            client.update_weights({})
        assert raised.value.__cause__ is not None

    def test_one_that_does_not_answer_and_one_that_dies(self, engine):
        """The last of the class: the engine is gone after it."""
        impatient = LLMClient(engine, timeout_seconds=1)
        stop(engine, signal.SIGSTOP)
        with pytest.raises(TransportTimeout):
            impatient.weight_version()
        with pytest.raises(TransportError, match="has not answered get_weight_version"):
            impatient.resume()
        threading.Timer(0.5, stop, (engine, signal.SIGKILL)).start()
        with pytest.raises(PeerLostError):
            LLMClient(engine, timeout_seconds=60).weight_version()


def stop(engine, number):
    for pid in engine.processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="module")
def async_engine(path, loop, engines_of_their_own):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def start():
        weights = {"backend": "ipc"}
        options = {**ENGINE, "disable_log_stats": True, "weight_transfer_config": weights}
        return AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(path), **options))

    async def settle():
        engine.shutdown()
        await asyncio.sleep(0.2)  # its tasks notice
        engine.engine_core.ctx.destroy(linger=0)  # vLLM leaves it to the collector, which warns

    engine = asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=120)
    yield engine
    asyncio.run_coroutine_threadsafe(settle(), loop).result(timeout=30)


@pytest.mark.vllm
@pytest.mark.slow
class TestAsyncLLM:
    @pytest.fixture
    def engine(self, async_engine):
        return async_engine

    @pytest.fixture
    def client(self, engine, loop):
        return AsyncLLMClient(engine, loop, timeout_seconds=30)

    def request(self, engine, loop, name):
        """A greedy request of 200 tokens, as a future, and what has arrived of it so far."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
        arrived = []

        async def run():
            async for output in engine.generate({"prompt_token_ids": [1, 2, 3]}, params, name):
                arrived[:] = output.outputs[0].token_ids
            return list(arrived)

        return asyncio.run_coroutine_threadsafe(run(), loop), arrived

    def test_a_request_in_flight_waits_and_goes_on(self, client, engine, loop):
        expected = self.request(engine, loop, "whole")[0].result(timeout=60)
        future, arrived = self.request(engine, loop, "paused")
        assert wait_until(lambda: arrived)
        client.pause("keep")
        stopped_at = len(arrived)
        assert 0 < stopped_at < 200
        time.sleep(0.3)
        assert len(arrived) == stopped_at
        assert not client.reset_caches(running=False), "the request holds its blocks"
        client.start_weight_update()
        client.finish_weight_update("5")
        assert client.reset_caches(running=True)
        client.resume()
        assert future.result(timeout=60) == expected
        assert client.reset_caches(running=False)
        assert client.weight_version() == "5"
        assert client.world_size() == 1

    def test_aborting(self, client, engine, loop):
        future, arrived = self.request(engine, loop, "aborted")
        assert wait_until(lambda: arrived)
        client.pause("abort")
        assert len(future.result(timeout=30)) < 200
        client.resume()

    def test_waiting(self, client, engine, loop):
        future, arrived = self.request(engine, loop, "awaited")
        assert wait_until(lambda: arrived)
        client.pause("wait")
        assert len(future.result(timeout=1)) == 200
        client.resume()

    def test_refusals(self, client):
        with pytest.raises(TransportError, match="start_weight_update must be called"):
            client.update_weights({})
        with pytest.raises(TransportError, match="IPCWeightTransferEngine"):
            client.init_weight_transfer_engine({"nonsense": 1})

    def test_one_that_does_not_answer(self, engine, loop):
        release = threading.Event()
        loop.call_soon_threadsafe(release.wait, 30)
        try:
            with pytest.raises(TransportTimeout):
                AsyncLLMClient(engine, loop, timeout_seconds=0.5).resume()
        finally:
            release.set()

    def test_the_loops_own_thread_is_refused(self, client, loop):
        async def call():
            client.resume()

        with pytest.raises(TransportError):
            asyncio.run_coroutine_threadsafe(call(), loop).result(timeout=30)

    def test_a_closed_loop(self, engine):
        closed = asyncio.new_event_loop()
        closed.close()
        with pytest.raises(TransportError):
            AsyncLLMClient(engine, closed).resume()
