"""vLLM servers that we start: their command, their start, their death and everybody's around it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.errors import raises
from support.models import make_model, save_model
from support.processes import alive
from support.servers import ENGINE, answering, stand_in_for_vllm, wait_until
from typer.testing import CliRunner

from qerl_sync.cli.main import app
from qerl_sync.engines.http import HTTPClient
from qerl_sync.errors import ConfigError, PeerLostError, SyncError, TransportTimeout
from qerl_sync.serving.command import (
    SWITCHES,
    ServerSpec,
    is_loopback,
    local_url,
    options,
    server_argv,
    server_environment,
)
from qerl_sync.serving.log import complaint_in, last_line
from qerl_sync.serving.processes import descendants, members
from qerl_sync.serving.server import ServerProcess
from qerl_sync.wire.tokens import TOKEN_VARIABLE


@pytest.fixture
def model(tmp_path):
    """As much of a model as is looked at before vLLM starts."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return str(directory)


class TestCommand:
    @pytest.mark.parametrize(
        ("engine", "words"),
        [
            ({"enforce_eager": True}, ["--enforce-eager"]),
            ({"enforce_eager": False}, ["--no-enforce-eager"]),
            ({"disable_log_stats": False}, []),
            ({"disable_log_stats": True}, ["--disable-log-stats"]),
            ({"max_model_len": 64}, ["--max-model-len=64"]),
            ({"gpu_memory_utilization": 0.5}, ["--gpu-memory-utilization=0.5"]),
            ({"quantization": None}, []),
            ({"dtype": "float32"}, ["--dtype=float32"]),
            ({"hf_overrides": {"a": [1]}}, ['--hf-overrides={"a": [1]}']),
            ({"served_model_name": ["a", "b"]}, ["--served-model-name", "a", "b"]),
            ({"cudagraph_capture_sizes": [1, 2]}, ["--cudagraph-capture-sizes", "1", "2"]),
            ({"cudagraph_capture_sizes": []}, []),
        ],
    )
    def test_engine_arguments(self, engine, words):
        assert options(engine) == words

    def test_the_server_can_be_driven_by_trl_and_by_us(self, model):
        argv = server_argv(ServerSpec(model, {"max_model_len": 64}, extra=["--seed", "3"]), 8001)
        assert argv[argv.index("-m") + 1 :] == [
            "vllm.entrypoints.openai.api_server",
            f"--model={model}",
            "--host=127.0.0.1",
            "--port=8001",
            '--weight-transfer-config={"backend": "qerl"}',
            "--logprobs-mode=processed_logprobs",
            "--max-logprobs=-1",
            "--middleware=qerl_sync.serving.middleware.ServingGuardMiddleware",
            "--max-model-len=64",
            "--seed",
            "3",
        ]

    def test_without_a_backend_no_weights_are_taken(self, model):
        argv = server_argv(ServerSpec(model, backend=None), 8001)
        assert not [word for word in argv if "weight-transfer" in word]
        assert [word for word in argv if "middleware" in word], "collective_rpc is there"

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"engine": {"port": 1}}, "'port'"),
            ({"engine": {"logprobs_mode": "raw_logprobs"}}, "'logprobs_mode'"),
            ({"engine": {"--seed": 1}}, "'--seed'"),
            ({"extra": ["--port=1"]}, "--port=1"),
            ({"extra": ["--ssl_keyfile", "k"]}, "--ssl_keyfile"),
            ({"model": "/no/such/model"}, "/no/such/model"),
            ({"model": "runs/no/model"}, str(Path(__file__).parents[2] / "runs/no/model")),
            ({"model": "tests/no_model"}, str(Path(__file__).parents[2] / "tests/no_model")),
            ({"model": str(Path(__file__).parent)}, str(Path(__file__).parent)),
        ],
    )
    def test_what_cannot_be_right(self, changes, named, model, monkeypatch):
        monkeypatch.chdir(Path(__file__).parents[2])
        with pytest.raises(ConfigError) as raised:
            ServerSpec(**{"model": model, **changes})
        assert named in str(raised.value)

    def test_a_name_on_the_hub_is_left_to_vllm(self):
        assert ServerSpec("Qwen/Qwen3-0.6B").model == "Qwen/Qwen3-0.6B"

    def test_environment(self):
        base = {
            "VLLM_CPU_KVCACHE_SPACE": "7",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_SERVER_DEV_MODE": "0",
            "OTHER": "stays",
        }
        environment = server_environment(base)
        assert environment["VLLM_SERVER_DEV_MODE"] == "1"
        assert environment["VLLM_CPU_KVCACHE_SPACE"] == "7"
        assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
        assert environment["VLLM_LOGGING_LEVEL"] == "INFO"
        assert environment["OTHER"] == "stays"
        assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in environment
        assert server_environment({"VLLM_LOGGING_LEVEL": "DEBUG"})["VLLM_LOGGING_LEVEL"] == "DEBUG"

    @pytest.mark.parametrize(
        ("host", "loopback", "url"),
        [
            ("127.0.0.1", True, "http://127.0.0.1:80"),
            ("localhost", True, "http://localhost:80"),
            ("::1", True, "http://[::1]:80"),
            ("0.0.0.0", False, "http://127.0.0.1:80"),
            ("::", False, "http://[::1]:80"),
            ("10.0.0.7", False, "http://10.0.0.7:80"),
            ("trainer-3", False, "http://trainer-3:80"),
        ],
    )
    def test_addresses(self, host, loopback, url):
        assert is_loopback(host) is loopback
        assert local_url(host, 80) == url


VLLM_LOG = """\
(APIServer pid=7) \x1b[32mINFO\x1b[0m 11-22 18:06:37 [api_utils.py:286] non-default args: {}
(Worker pid=9) ERROR 11-22 18:06:52 [multiproc_executor.py:948] Traceback (most recent call last):
(Worker pid=9) ERROR 11-22 18:06:52 [multiproc_executor.py:948]   File "x.py", line 3, in f
(Worker pid=9) ERROR 11-22 18:06:52 [multiproc_executor.py:948] RuntimeError: Cannot find weights
(EngineCore pid=8) Traceback (most recent call last):
(EngineCore pid=8)   File "y.py", line 3, in f
(EngineCore pid=8) RuntimeError: Cannot find weights
Traceback (most recent call last):
  File "z.py", line 3, in f
    raise RuntimeError(
pydantic_core.ValidationError: 1 error
  Value error, too long
RuntimeError: Engine core initialization failed. See root cause above.
"""


class TestLog:
    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            (
                VLLM_LOG,
                "RuntimeError: Cannot find weights\n"
                "pydantic_core.ValidationError: 1 error\n"
                "  Value error, too long\n"
                "RuntimeError: Engine core initialization failed. See root cause above.",
            ),
            ("usage: x\n  [--a]\nx.py: error: no such thing\n", "x.py: error: no such thing"),
            ("one\n\ntwo\n", "one\ntwo"),
            ("", "(it is empty)"),
        ],
    )
    def test_what_a_person_needs_of_it(self, text, complaint, tmp_path):
        log = tmp_path / "server.log"
        log.write_text(text)
        assert complaint_in(log) == complaint

    def test_the_last_line_that_is_no_continuation(self, tmp_path):
        log = tmp_path / "server.log"
        log.write_text("(Worker pid=9) INFO 11-22 18:06:52 [a.py:9] loading\n\tdetails\n")
        assert last_line(log) == "loading"
        assert last_line(tmp_path / "none.log") == ""


class TestServerProcess:
    """On a stand-in for vLLM: what it does as a process is the same, and it starts at once."""

    @pytest.fixture
    def server(self, model, tmp_path, monkeypatch, started):
        def make(before: str = "", port: int | None = None, **options) -> ServerProcess:
            package = stand_in_for_vllm(tmp_path / "package", before)
            monkeypatch.setenv("PYTHONPATH", str(package))
            log = tmp_path / "run" / "server.log"
            return ServerProcess(ServerSpec(model, port=port), log=log, **options)

        yield make
        assert not started()

    def test_from_start_to_end(self, server, started):
        with server() as one:
            assert HTTPClient(one.url).health()
            assert "--max-logprobs=-1" in one.log.read_text()
            # guard, server, engine core, worker
            assert len(started()) == 4
            one.check()
        assert not HTTPClient(one.url).health()
        with raises(PeerLostError, exit_code=None):
            one.check()
        one.stop()

    def test_it_stops_whatever_happens_in_the_block(self, server):
        with pytest.raises(KeyboardInterrupt), server():
            raise KeyboardInterrupt

    def test_one_that_does_not_listen_to_sigterm(self, server):
        deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
        with server(deaf, grace_seconds=0.2):
            pass

    def test_none_without_a_token_for_other_machines(self, server, started, monkeypatch):
        monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
        one = server()
        one.spec = ServerSpec(one.spec.model, host="0.0.0.0")
        with pytest.raises(ConfigError, match=TOKEN_VARIABLE), one:
            pass
        monkeypatch.setenv(TOKEN_VARIABLE, "a secret")
        with one:
            assert started()

    def test_no_address_before_it_is_started(self, server):
        with pytest.raises(SyncError):
            _ = server().url

    def test_its_death_at_start_is_told_at_once_with_its_words(self, server):
        failing = "raise RuntimeError('no such kernel')"
        with raises(PeerLostError, exit_code=1) as raised, server(failing):
            pass
        assert "server.log:\nRuntimeError: no such kernel" in str(raised.value)

    def test_its_death_later_is_noticed_when_asked(self, server):
        dying = "import threading; threading.Timer(1.0, lambda: os.kill(os.getpid(), 9)).start()"
        with server(dying) as one:
            assert one.wait() == 128 + signal.SIGKILL
            with raises(PeerLostError, exit_code=128 + signal.SIGKILL):
                one.check()

    def test_an_option_that_it_does_not_know(self, server, model):
        one = server()
        one.spec = ServerSpec(model, {"max_modle_len": 3})
        with (
            pytest.raises(PeerLostError, match=r":\napi_server.py: error: .*--max-modle-len=3$"),
            one,
        ):
            pass

    @pytest.mark.slow
    def test_a_slow_start_shows_life_and_ends_in_time(self, server):
        seen = []
        slow = "print('loading', flush=True); time.sleep(600)"
        begun = time.monotonic()
        one = server(slow, start_timeout_seconds=4, progress=lambda *life: seen.append(life))
        with pytest.raises(TransportTimeout) as raised, one:
            pass
        assert "loading" in str(raised.value)
        assert seen[-1][1] == "loading"
        assert time.monotonic() - begun < 60

    def test_a_port_in_use(self, server):
        with answering() as (url, _):
            port = int(url.rpartition(":")[2])
            with (
                raises(ConfigError, port=port),
                server(port=port),
            ):
                pass

    @pytest.mark.slow
    def test_somebody_else_that_answers_there_is_not_taken_for_it(self, server, tmp_path, started):
        """Two runs that start at the same time with the same port."""
        (tmp_path / "health").touch()
        one = server("time.sleep(600)", start_timeout_seconds=4)
        stranger = socket.create_server(("127.0.0.1", 0))
        port = stranger.getsockname()[1]
        stranger.close()
        one.spec = ServerSpec(one.spec.model, port=port)
        was_healthy = []

        def listen_too():
            assert wait_until(started)
            program = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
            with subprocess.Popen(program, stderr=subprocess.DEVNULL, cwd=tmp_path) as other:
                client = HTTPClient(f"http://127.0.0.1:{port}")
                was_healthy.append(wait_until(client.health))
                time.sleep(1)
                other.kill()

        thread = threading.Thread(target=listen_too)
        thread.start()
        try:
            with pytest.raises(TransportTimeout), one:
                pass
        finally:
            thread.join()
        assert was_healthy == [True]

    def test_a_forked_child_does_not_stop_it(self, server):
        with server() as one:
            child = subprocess.run(
                [sys.executable, "-c", "pass"], check=True, preexec_fn=one.stop, timeout=30
            )
            assert child.returncode == 0
            assert HTTPClient(one.url).health()


PARENT = """
import sys, time
from pathlib import Path
from qerl_sync.serving.command import ServerSpec
from qerl_sync.serving.server import ServerProcess

import json
spec = ServerSpec(sys.argv[1], engine=json.loads(sys.argv[3]), backend=None)
with ServerProcess(spec, log=Path(sys.argv[2]), grace_seconds=5):
    print("ready", flush=True)
    time.sleep(600)
"""


class Parent:
    """A program that holds a server, and the server's processes."""

    def __init__(self, model: str, log: Path, engine: dict | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, model, str(log), json.dumps(engine or {})],
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def guards(self) -> list[int]:
        return [p.pid for p in psutil.Process(self.process.pid).children()]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_does_not_outlive_its_parent(number, model, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(stand_in_for_vllm(tmp_path / "package")))
    parent = Parent(model, tmp_path / "server.log")
    try:
        assert parent.process.stdout.readline() == "ready\n"
        pids = descendants(parent.process.pid)
        assert len(pids) == 4
        parent.process.send_signal(number)
        assert wait_until(lambda: not alive(pids)), alive(pids)
    finally:
        parent.close()


def test_a_guard_that_is_killed_takes_the_server_with_it(model, tmp_path, monkeypatch, started):
    monkeypatch.setenv("PYTHONPATH", str(stand_in_for_vllm(tmp_path / "package")))
    with ServerProcess(ServerSpec(model), log=tmp_path / "server.log") as one:
        ours = started()
        (guard,) = [p.pid for p in psutil.Process().children() if p.pid in ours]
        server, *rest = descendants(guard)
        session = members(guard)
        os.kill(guard, signal.SIGKILL)
        assert wait_until(lambda: not alive([server]))
        with pytest.raises(PeerLostError):
            one.check()
    assert wait_until(lambda: not alive(session)), "the engine core, of the same session"
    for pid in alive(rest):  # the stand-in's worker has left it: without the guard it stays
        os.kill(pid, signal.SIGKILL)


class TestServe:
    """`qerl-sync serve`"""

    def test_help(self):
        result = CliRunner().invoke(app, ["serve", "--help"])
        assert result.exit_code == 0
        assert "--port" in result.output

    def test_what_is_wrong_is_said_before_vllm_starts(self):
        result = CliRunner().invoke(app, ["serve", "/no/such/model"])
        assert result.exit_code == 2
        assert "there is no /no/such/model" in result.output

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_says_where_it_is_and_stops_when_told(self, number, model, tmp_path):
        package = stand_in_for_vllm(tmp_path / "package")
        with subprocess.Popen(
            [sys.executable, "-m", "qerl_sync.cli", "serve", model, "--port", "0"],
            env={**os.environ, "PYTHONPATH": str(package), "COLUMNS": "80"},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        ) as process:
            said = ""
            while "Ctrl-C" not in said:
                line = process.stderr.readline()
                assert line, said
                said += line
            pids = descendants(process.pid)
            url = re.search(r"ready at (\S+)", said)[1]
            assert f'vllm_mode="server", vllm_server_base_url="{url}"' in said
            assert HTTPClient(url).health()
            process.send_signal(number)
            rest = process.communicate(timeout=60)[1]
        assert process.returncode == 0, rest
        assert "stopped" in rest
        assert not alive(pids)

    @pytest.mark.parametrize(
        ("host", "token", "words"),
        [
            ("127.0.0.1", "", "QERL_SYNC_TOKEN is not set"),
            ("127.0.0.1", "secret", None),
            ("0.0.0.0", "", "QERL_SYNC_TOKEN was not set"),
            ("0.0.0.0", "secret", "other machines can reach the server at 0.0.0.0"),
        ],
    )
    def test_strangers_are_kept_out(self, host, token, words, model, tmp_path, monkeypatch, capfd):
        """Where other machines reach the server it has a token, which is shown if it is new."""
        ending = "sys.exit('no vLLM here, with ' + os.environ['QERL_SYNC_TOKEN'])"
        monkeypatch.setenv("PYTHONPATH", str(stand_in_for_vllm(tmp_path / "package", ending)))
        monkeypatch.setenv(TOKEN_VARIABLE, token)
        result = CliRunner().invoke(app, ["serve", model, "--port=0", f"--host={host}"])
        assert result.exit_code == 2, result.output
        assert "ended with code 1 before it was ready; its output says why" in result.output
        assert (words is None) is (TOKEN_VARIABLE not in result.output)
        assert (words or "") in result.output
        assert ("warning" in result.output) is (host == "0.0.0.0")
        shown = re.findall(r"^  export QERL_SYNC_TOKEN=(\S{64})$", result.output, re.MULTILINE)
        assert len(shown) == (host == "0.0.0.0" and not token)
        assert f"no vLLM here, with {[token, *shown][-1]}" in capfd.readouterr().err.splitlines()
        assert token == "" or token not in result.output


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    directory = tmp_path_factory.mktemp("served")
    return save_model(make_model("dense", 0), directory / "model").parent


@pytest.fixture(scope="module")
def vllm_server(served):
    spec = ServerSpec(str(served / "model"), ENGINE, backend="ipc")
    others = set(descendants(os.getpid()))
    with ServerProcess(spec, log=served / "server.log") as server:
        yield server
        pids = [pid for pid in descendants(os.getpid()) if pid not in others]
    assert not alive(pids)


@pytest.mark.vllm
@pytest.mark.slow
class TestVLLM:
    @pytest.fixture
    def server(self, vllm_server):
        return vllm_server

    @pytest.fixture
    def client(self, server):
        return HTTPClient(server.url, timeout_seconds=60)

    def test_it_has_the_routes_that_we_and_trl_need(self, client):
        assert client.world_size() == 1
        assert client.weight_version() == "default"
        client.start_weight_update()
        client.finish_weight_update("7")
        assert client.weight_version() == "7"

    def test_its_refusals_arrive_in_its_words(self, client):
        with pytest.raises(SyncError, match="start_weight_update must be called"):
            client.update_weights({})

    def test_a_request_in_flight_outlives_a_pause(self, server, client):
        import requests

        asked = {"model": server.spec.model, "prompt": [1, 2, 3], "max_tokens": 200}
        asked |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        url = f"{server.url}/v1/completions"

        def complete():
            answer = requests.post(url, json=asked, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["token_ids"]

        def is_held() -> bool:
            """Whether the pause came in its middle, which on a busy machine takes some tries."""
            found = []
            thread = threading.Thread(target=lambda: found.append(complete()))
            thread.start()
            time.sleep(0.05)
            client.pause("keep")
            try:
                thread.join(timeout=1)
                assert client.health()
                held = not found
                assert client.reset_caches(running=True)
            finally:
                client.resume()
            thread.join(timeout=60)
            assert found == [expected]
            return held

        expected = complete()
        assert len(expected) == 200
        assert any(is_held() for _ in range(10))

    def test_trl_would_be_served(self, server):
        import requests

        info = requests.get(f"{server.url}/server_info?config_format=json", timeout=30).json()
        assert info["vllm_config"]["weight_transfer_config"] is not None

    def test_every_switch_is_one(self):
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = make_arg_parser(FlexibleArgumentParser())
        kinds = {action.dest: type(action).__name__ for action in parser._actions}
        switches = {name for name, kind in kinds.items() if kind == "_StoreTrueAction"}
        assert switches - {"headless", "grpc"} == SWITCHES

    def test_vllms_engine_does_not_outlive_a_killed_parent(self, served):
        parent = Parent(str(served / "model"), served / "killed.log", ENGINE)
        try:
            # guard, server, resource tracker, engine core, worker
            assert wait_until(lambda: len(descendants(parent.process.pid)) >= 5, seconds=240)
            pids = descendants(parent.process.pid)
            parent.process.kill()
            assert wait_until(lambda: not alive(pids), seconds=30), alive(pids)
        finally:
            parent.close()
