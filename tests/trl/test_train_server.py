"""Rollouts in other processes: `qerl-sync train` and plain TRL with a vLLM server, and with vLLM's
engine in a process of its own."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from support.models import make_model
from support.processes import alive
from support.servers import stand_in_for_vllm, wait_until
from support.trainers import build_trainer, gap, save_policy

import qerl_sync
from qerl_sync import ConfigError
from qerl_sync.config import TrainConfig
from qerl_sync.engines.http import HTTPClient
from qerl_sync.errors import PeerLostError
from qerl_sync.serving.processes import descendants
from qerl_sync.training.directory import RunDirectory
from qerl_sync.training.display import Display
from qerl_sync.training.rollouts import rollout_server
from qerl_sync.wire.tokens import TOKEN_VARIABLE

ROOT = Path(__file__).parents[2]
SHARED_MEMORY = Path("/dev/shm")
CONFIG = "configs/grpo_cpu_server.yaml"
SHORT = ["trainer.max_steps=4", "trainer.save_steps=4", "warmup.trainer.max_steps=8"]


def segments_of(pid: int) -> list[str]:
    return [path.name for path in SHARED_MEMORY.glob(f"qerl_sync-{pid}-*")]


# -------------------------------------------------------- the server of a run, without vLLM itself


@pytest.fixture
def run(tmp_path, monkeypatch, started):
    """Opens the server of a run: the stand-in for vLLM's program, started as vLLM would be."""
    monkeypatch.setenv("PYTHONPATH", str(stand_in_for_vllm(tmp_path / "package")))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    def open_server(**rollout):
        smallest = {"model": {"path": "m"}, "data": {"task": "addition"}, "reward": "exact_match"}
        config = TrainConfig(
            **smallest, output_dir=str(tmp_path), rollout={"mode": "server", **rollout}
        )
        display = Display(Console(file=io.StringIO(), width=100))
        return rollout_server(config, str(tmp_path / "model"), RunDirectory(tmp_path), display)

    yield open_server
    assert not started()


def test_a_server_lives_as_long_as_its_run(run, tmp_path):
    before = signal.getsignal(signal.SIGCHLD)
    with run() as url:
        assert url.startswith("http://127.0.0.1:")
        assert "arguments: --model" in (tmp_path / "vllm.log").read_text()
    assert signal.getsignal(signal.SIGCHLD) is before
    with pytest.raises(KeyboardInterrupt), run():
        raise KeyboardInterrupt


def token_of(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(variable.partition("=")[::2] for variable in variables).get(TOKEN_VARIABLE, "")


def test_a_server_and_its_run_share_a_token(run, started, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    seen = []
    for _ in range(2):
        with run():
            seen.append(os.environ[TOKEN_VARIABLE])
            assert {token_of(pid) for pid in started()[:2]} == {seen[-1]}
        assert TOKEN_VARIABLE not in os.environ
    assert len(set(seen)) == 2
    assert min(map(len, seen)) >= 32
    monkeypatch.setenv(TOKEN_VARIABLE, "somebody's own")
    with run() as url:
        assert token_of(started()[1]) == "somebody's own"
        with run(server_url=url):
            assert os.environ[TOKEN_VARIABLE] == "somebody's own"
    assert os.environ[TOKEN_VARIABLE] == "somebody's own"


def test_the_death_of_a_server_ends_the_run_at_once(run, started):
    def live_on():
        _, server, *_ = started()
        os.kill(server, signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(PeerLostError, match=r"signal 9; the end of its log"), run():
        live_on()
    assert not started()


def fail():
    raise PeerLostError("cannot be reached")


def test_who_cannot_reach_a_dead_server_is_told_why(run, started):
    """Where the failed request comes before the news of the death."""

    def lose():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.kill(started()[1], signal.SIGKILL)
        fail()

    with pytest.raises(PeerLostError, match=r"signal 9; the end of its log") as caught, run():
        lose()
    assert str(caught.value.__cause__) == "cannot be reached"


@pytest.mark.slow
def test_who_cannot_reach_a_server_that_lives_is_told_what_it_says(run):
    with pytest.raises(PeerLostError, match=r"cannot be reached; the log .*vllm\.log:\n"), run():
        fail()


def test_an_existing_server_is_waited_for_and_left_alone(run, started):
    with run() as url:
        with run(server_url=url) as same:
            assert same == url
        assert len(started()) > 1
    with pytest.raises(PeerLostError, match=f"no vLLM server answers at {url} within 0.1 s"):
        run(server_url=url, start_timeout_seconds=0.1).__enter__()


def test_runs_without_a_server_have_none(run):
    with run(mode="subprocess") as url:
        assert url is None


def test_a_call_in_which_the_engine_dies_is_not_waited_for():
    """vLLM's server then stops listening, and answers the call never."""
    listener = socket.create_server(("127.0.0.1", 0))
    client = HTTPClient(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_seconds=60)
    with ThreadPoolExecutor() as executor:
        call = executor.submit(client.start_weight_update)
        connection, _ = listener.accept()
        listener.close()
        with connection, pytest.raises(PeerLostError, match=r"start_weight_update: .* is dead"):
            call.result(timeout=30)


# ----------------------------------------------------------------------------- plain TRL, in parts


def trainer_of(**changes):
    """As much of a trainer in server mode as `bind` looks at, on a server as it should be."""
    model = make_model("tied", 0)
    config = {
        "weight_transfer_config": {"backend": "qerl"},
        "model_config": {"logprobs_mode": "processed_logprobs"},
    }
    client = SimpleNamespace(
        base_url="http://x",
        get_server_info=lambda: {**config, **changes},
        generate=lambda *given: given,
    )
    generation = SimpleNamespace(
        mode="server",
        tensor_parallel_size=1,
        enable_sleep_mode=False,
        vllm_client=client,
        generate=lambda *given: client.generate(*given),
        sync_weights=lambda: None,
    )
    accelerator = SimpleNamespace(
        num_processes=1, is_main_process=True, unwrap_model=lambda model: model
    )
    return SimpleNamespace(
        vllm_generation=generation,
        accelerator=accelerator,
        model=model,
        args=SimpleNamespace(),
        state=SimpleNamespace(global_step=0),
        _metrics={"train": defaultdict(list)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("transfer", [None, {"backend": "nccl"}])
def test_servers_that_do_not_take_our_weights_are_refused(transfer):
    with pytest.raises(ConfigError, match=r"http://x has the .*backend.*\"qerl\".*serve"):
        qerl_sync.WeightSyncCallback().bind(trainer_of(weight_transfer_config=transfer))


def test_servers_without_rl_routes_are_refused():
    def refuse():
        raise RuntimeError("Restart it with VLLM_SERVER_DEV_MODE=1.")

    trainer = trainer_of()
    trainer.vllm_generation.vllm_client.get_server_info = refuse
    with pytest.raises(ConfigError, match=r"DEV_MODE=1\. `qerl-sync serve` starts one"):
        qerl_sync.WeightSyncCallback().bind(trainer)


def test_other_log_probabilities_are_warned_of(caplog):
    with caplog.at_level("WARNING", logger="qerl_sync"):
        qerl_sync.WeightSyncCallback().bind(trainer_of()).close()
        assert not caplog.records
        other = {"logprobs_mode": "raw_logprobs"}
        qerl_sync.WeightSyncCallback().bind(trainer_of(model_config=other)).close()
    (record,) = caplog.records
    assert "raw_logprobs" in record.getMessage()


@pytest.mark.slow
def test_the_asynchronous_door_is_as_trl_describes_it(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from inspect import getmembers, isfunction, signature

    from trl.experimental.async_grpo.async_grpo_trainer import WeightTransferProtocol

    from qerl_sync.integrations.trl_async import AsyncWeightTransfer

    asked = [name for name, _ in getmembers(WeightTransferProtocol, isfunction) if name[0] != "_"]
    assert len(asked) == 5
    for name in asked:
        theirs = signature(getattr(WeightTransferProtocol, name))
        assert [*signature(getattr(AsyncWeightTransfer, name)).parameters] == [*theirs.parameters]
    with pytest.raises(ConfigError, match=r"call `transfer\.bind\(trainer\)`"):
        AsyncWeightTransfer("http://x").init_weight_transfer()


# -------------------------------------------------------------------- plain TRL, on a real server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A policy and the address of a vLLM server with it."""
    from qerl_sync.serving.command import ServerSpec
    from qerl_sync.serving.server import ServerProcess

    directory = tmp_path_factory.mktemp("served")
    policy = save_policy(directory / "policy")
    engine = {"dtype": "float32", "enforce_eager": True, "max_model_len": 32, "max_num_seqs": 8}
    engine["num_gpu_blocks_override"] = 64
    with ServerProcess(ServerSpec(str(policy), engine), log=directory / "vllm.log") as server:
        yield policy, server.url


def server_trainer(served, directory, *callbacks, **changes):
    policy, url = served
    server = {"vllm_mode": "server", "vllm_server_base_url": url, "max_steps": 3}
    return build_trainer(policy, directory, callbacks, **server, **changes)


@pytest.mark.vllm
@pytest.mark.slow
class TestPlainTRL:
    def test_the_same_sync_metrics_and_report_as_colocated(self, served, tmp_path):

        callback = qerl_sync.WeightSyncCallback(chunk_bytes="64KiB")
        trainer = server_trainer(served, tmp_path, callback)
        trainer.train()
        log, reports = trainer.state.log_history, callback.reports
        assert [report.step for report in reports] == [0, 1, 2]
        assert [report.version for report in reports] == [1, 2, 3]
        assert all(report.prediction_exact and report.num_chunks > 1 for report in reports)
        assert all(report.transport.startswith("shm: ") for report in reports)
        logged = [entry for entry in log if "sync/version" in entry]
        assert [entry["sync/version"] for entry in logged] == [1, 2, 3]
        assert logged[0]["sync/bytes"] == callback.session.plan.nbytes
        assert "sampling/sampling_logp_difference/max" in log[0]
        assert 0 < gap(log) <= 1e-5

        # The server was last synced before the last optimizer step: evaluation must sync again.
        trainer.evaluate()
        assert HTTPClient(served[1]).weight_version() == "4"
        callback.close()
        assert segments_of(os.getpid()) == []

    def test_a_second_trainer_goes_on_with_the_servers_version(self, served, tmp_path):
        """After the first test, which left the server on other weights. Built without callback."""
        callback = qerl_sync.WeightSyncCallback(transport="tcp")
        with callback.connecting():
            trainer = server_trainer(served, tmp_path, num_iterations=2)
        with closing(callback.bind(trainer)):
            trainer.train()
        assert [report.version for report in callback.reports] == [5, 6]
        assert {report.transport for report in callback.reports} == {"tcp: sync.transport says so"}
        assert gap(trainer.state.log_history) <= 1e-5

    def test_adapters_are_merged_into_what_is_sent_to_a_server(self, served, tmp_path):
        """One that serves no adapters: `sync.lora: auto` says so."""
        from peft import LoraConfig

        callback = qerl_sync.WeightSyncCallback()
        trainer = server_trainer(
            served,
            tmp_path,
            callback,
            peft_config=LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        )
        with closing(callback):
            trainer.train()
        assert callback.reports[0].unsent_tensors == 0
        assert all(report.unsent_tensors for report in callback.reports[1:])
        assert 0 < gap(trainer.state.log_history) <= 1e-5

    def test_trl_alone_cannot_be_built_here(self, served, tmp_path):
        """Why TRL's join is replaced. When this fails, TRL has learned to do without CUDA."""
        with pytest.raises(NotImplementedError, match="needs a CUDA device"):
            server_trainer(served, tmp_path)

    def test_the_asynchronous_door(self, served):
        from qerl_sync.integrations.trl_async import AsyncWeightTransfer

        recorded = []
        trainer = SimpleNamespace(
            model=make_model("tied", 1),
            accelerator=SimpleNamespace(is_main_process=True, unwrap_model=lambda model: model),
            args=SimpleNamespace(seed=0),
            state=SimpleNamespace(global_step=7, max_steps=10),
            _metrics={"train": defaultdict(list)},
        )
        transfer = AsyncWeightTransfer(served[1], recorder=recorded.append)
        trainer.weight_transfer = transfer
        transfer.bind(trainer)
        transfer.init_weight_transfer()
        transfer.pause()
        transfer.send_weights(iter(()))
        transfer.resume()
        transfer.destroy()
        (report,) = recorded
        assert report.step == 7
        assert report.prediction_exact
        assert trainer._metrics["train"]["sync/version"] == [report.version]
        assert HTTPClient(served[1]).weight_version() == str(report.version)


# ------------------------------------------------------------------------- the command, real runs


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qerl_sync.cli", "train", CONFIG, *SHORT, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(run: subprocess.Popen[str], wait_for: str = "") -> tuple[str, set[int]]:
    """Read it to its end; on the line with `wait_for` note its processes and send Ctrl-C to its
    group, as a terminal does. Returns what it said and those processes."""
    said, seen = [], set()
    with run:
        for line in run.stdout:
            said.append(line)
            if wait_for and wait_for in line and not seen:
                seen = set(descendants(run.pid))
                os.killpg(run.pid, signal.SIGINT)
    return "".join(said), seen


def check_run(directory: Path, text: str, transport: str, num_steps: int) -> None:
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["transport"].startswith(f"{transport}: ")
    assert summary["num_steps"] == summary["num_syncs"] == num_steps
    assert summary["prediction_exact"]
    assert summary["max_open_layers"] == 1
    assert 0 < summary["logprob_gap_max"] <= 1e-5
    lines = (directory / "syncs.jsonl").read_text().splitlines()
    assert all(json.loads(line)["num_chunks"] > 1 for line in lines)
    assert "INFO" in (directory / "vllm.log").read_text()
    # Only where a slow machine waits long does a line say what the server said last.
    assert not [line for line in text.splitlines() if "INFO" in line and "..." not in line]
    assert "Traceback" not in text


@pytest.mark.vllm
@pytest.mark.slow
def test_a_run_starts_its_server_trains_on_it_and_stops_it(tmp_path):
    run = start("--output-dir", tmp_path)
    text, _ = finish(run)
    assert run.returncode == 0, text
    assert "vLLM server started" in text
    check_run(tmp_path, text, "shm", 4)
    assert not segments_of(run.pid)


@pytest.mark.vllm
@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_an_engine_process_after_its_step(tmp_path):
    """The engine's process, of the same group, does not hear it."""
    more = ["rollout.mode=subprocess", "sync.transport=tcp", "trainer.max_steps=200"]
    run = start(*more, "--output-dir", tmp_path)
    text, processes = finish(run, wait_for="training 20/200")
    assert run.returncode == 130, text
    assert "stopped before the end; --resume goes on" in text
    steps = json.loads((tmp_path / "summary.json").read_text())["num_steps"]
    assert 20 <= steps < 200
    check_run(tmp_path, text, "tcp", steps)
    assert len(processes) > 1
    assert wait_until(lambda: not alive(processes))
    assert not segments_of(run.pid)
