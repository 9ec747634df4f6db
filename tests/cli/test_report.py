"""`qerl-sync report` and `qerl-sync explain`, of runs as the flight recorder leaves them."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest
from support.recorded_runs import record_run
from support.streams_by_hand import QKV, HandMadeTransport, ListSource, interleave
from typer.testing import CliRunner

from qerl_sync import SyncConfig, SyncSession, errors
from qerl_sync.cli.main import app
from qerl_sync.report import plots
from qerl_sync.report.findings import EXPLANATIONS, explain
from qerl_sync.report.live import LiveReport
from qerl_sync.report.recorded import RecordedRun
from qerl_sync.telemetry import files
from qerl_sync.telemetry.recorder import run_errors_recorded

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
OUTSIDE = r"(src|href|url)\s*[=(]|https?://|@import"


def run(*arguments: str | Path, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.output


def found(directory: Path) -> list[dict]:
    return json.loads(run("explain", directory, "--json"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """40 syncs: one was held otherwise than predicted, and two have failed."""
    directory = tmp_path_factory.mktemp("recorded")
    record_run(
        directory,
        num_syncs=40,
        num_layers=20,
        unusual={5},
        failed={12, 13},
        num_workers=2,
        budget_bytes=1 << 20,
    )
    return directory


@pytest.fixture(scope="module")
def page(recorded):
    run("report", recorded)
    return (recorded / "report.html").read_text(encoding="utf-8")


class TestPage:
    def test_it_needs_nothing_else(self, page):
        assert "{{" not in page
        assert not re.search(OUTSIDE, page)
        assert "prefers-color-scheme: dark" in page

    def test_it_shows_each_recorded_sync_and_equal_ones_once(self, page):
        # 16 last ones, one unusual before them with a trace of its own for two workers, 2 failed.
        assert page.count("<option ") == 16 + 2 + 2
        figures = page.count("data-figure=")
        assert figures == 3  # as predicted; otherwise; without a measurement
        data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
        assert len(data["orders"]) == figures
        assert [s["words"] for s in data["orders"][0]["streams"]] == ["predicted", "measured"]
        assert len(data["orders"][0]["streams"][0]["high"]) == 60

    def test_it_explains_what_explain_does(self, page, recorded):
        kinds = [finding["kind"] for finding in found(recorded)]
        assert kinds == ["failed", "warning", "advice"]
        assert re.findall(r'<article class="card finding" style="--color:var\(--(\w+)\)', page) == (
            kinds
        )

    def test_markdown_has_the_same_tables(self, page, recorded, tmp_path):
        run("report", recorded, "--md", "-o", tmp_path / "run.md")
        text = (tmp_path / "run.md").read_text(encoding="utf-8")
        headings = re.findall(r"<h2>(.*?)</h2>", page)
        pictures = {"Along the run", "Inside a sync"}
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == (
            [heading for heading in headings if heading not in pictures]
        )
        assert text.count("\n|") == page.count("<tr>") + page.count("<thead>")

    def test_a_run_without_findings_says_so(self, tmp_path):
        push(tmp_path)
        for name, options in (("report.html", []), ("report.md", ["--md"])):
            run("report", tmp_path, *options)
            assert "Nothing went wrong" in (tmp_path / name).read_text(encoding="utf-8")

    def test_a_trace_that_was_removed_and_written_again_is_read(self, tmp_path):
        """By a session that goes on: it forgets a trace, and a later sync has the same."""
        push(tmp_path)
        recorded = RecordedRun.read(tmp_path)
        (name, *_) = [path.name for path in (tmp_path / "traces").glob("trace-*")]
        (tmp_path / "traces" / name).rename(tmp_path / name)
        assert recorded.trace(name) is None
        (tmp_path / name).rename(tmp_path / "traces" / name)
        assert recorded.trace(name) is not None

    @pytest.mark.parametrize("content", [b"", b"a trace"])
    def test_a_damaged_trace_is_named(self, tmp_path, content):
        push(tmp_path)
        for trace in (tmp_path / "traces").glob("trace-*"):
            trace.write_bytes(content or trace.read_bytes()[:30])
        assert re.search(r"trace-\w+\.json\.gz is damaged", run("report", tmp_path, code=2))

    @pytest.mark.parametrize("reward", [float("-inf"), float("nan"), -1e15])
    def test_it_shows_the_rewards_that_an_axis_has(self, tmp_path, reward):
        push(tmp_path)
        for step, value in enumerate((reward, 1.0, 2.0)):
            files.append_line(tmp_path / files.LOG, {"step": step, "reward": value})
        run("report", tmp_path)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert "<h3>Reward</h3>" in page
        assert not re.search(r'd="[^"]*(nan|inf)', page)
        plots.plot_rewards(RecordedRun.read(tmp_path).rewards, tmp_path / "reward.png")

    @needs_chromium
    def test_a_browser_shows_it_and_the_keyboard_is_enough(self, page, tmp_path):
        """Pick another sync, then walk along its stream by the arrow keys."""
        keys = """<script>
          addEventListener("error", event => document.body.dataset.failed = event.message);
          const select = document.getElementById("pick");
          select.selectedIndex = select.options.length - 1;
          select.dispatchEvent(new Event("change"));
          const shown = [...document.querySelectorAll("[data-figure]")].filter(f => !f.hidden);
          document.body.dataset.shown = shown.length;
          const plot = shown[0].querySelector(".plot");
          plot.focus();
          for (const key of ["ArrowRight", "End"])
            plot.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
          document.body.dataset.focused = document.activeElement === plot;
        </script></body>"""
        dom = in_browser(page.replace("</body>", keys), tmp_path)
        assert 'data-shown="1" data-focused="true"' in dom
        assert "data-failed" not in dom
        said = re.search(r'id="said"[^>]*>(.*?)</div>', dom, re.DOTALL)[1]
        assert "Tensor 60 of 60" in said
        assert "model.layers.19.self_attn.qkv_proj" in said
        picked = re.search(r'id="picked"[^>]*>(.*?)</p>', dom)[1]
        assert "budget: 1.0 MiB" in picked


def in_browser(page: str, directory: Path, milliseconds: int = 2000) -> str:
    """Return the document of a page, or of an address, after so much of its own time."""
    url = page
    if not page.startswith("http:"):
        path = directory / "page.html"
        path.write_text(page, encoding="utf-8")
        url = path.as_uri()
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory}/user"]
    done = subprocess.run(
        [CHROMIUM, *options, f"--virtual-time-budget={milliseconds}", "--dump-dom", url],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def test_it_is_opened_in_a_browser(recorded, tmp_path, monkeypatch):
    """`BROWSER`, which Python's webbrowser takes for the browser's command."""
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/shown\n')
    browser.chmod(0o700)
    monkeypatch.setenv("BROWSER", str(browser))
    # webbrowser reads it once in a process.
    command = [sys.executable, "-m", "qerl_sync.cli", "report", str(recorded), "--open"]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, timeout=60)
    assert (tmp_path / "shown").read_text().strip() == (recorded / "report.html").as_uri()


class TestLive:
    @pytest.fixture
    def live(self, tmp_path):
        report = LiveReport(tmp_path)
        thread = threading.Thread(target=report.serve)
        thread.start()
        yield report
        report.close()
        thread.join(10)
        assert not thread.is_alive()

    def ask(self, live, path="", host=None) -> tuple[int, str]:
        connection = http.client.HTTPConnection(live.url.split("/")[2], timeout=20)
        with closing(connection):
            connection.request("GET", f"/{path}", headers={"Host": host} if host else {})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def get(self, live, path="") -> str:
        return self.ask(live, path)[1]

    def test_it_waits_for_a_run_and_shows_each_sync(self, live, tmp_path):
        assert "Waiting" in self.get(live)
        session, seen = session_in(tmp_path), {self.get(live, "state")}
        for version in (1, 2):
            session.push(step=version)
            state, page = self.get(live, "state"), self.get(live)
            assert f'data-state="{state}"' in page
            assert page.count("<option ") == version
            seen.add(state)
        assert len(seen) == 3
        assert self.get(live) is not None
        assert self.get(live, "state") == state, "nothing is new"

    def test_a_record_that_is_written_after_its_line_is_shown(self, live, tmp_path):
        """A browser may have got the page in between."""
        push(tmp_path)
        (record,) = (tmp_path / "traces").glob("sync-*.json")
        content = record.read_bytes()
        record.unlink()
        assert self.get(live).count("<option ") == 0
        record.write_bytes(content)
        assert self.get(live).count("<option ") == 1

    @pytest.mark.parametrize(
        ("path", "host", "status"),
        [
            ("syncs.jsonl", None, 404),
            ("", "elsewhere.example:80", 403),
            ("state", "127.0.0.1", 200),  # what a browser says of port 80
        ],
    )
    def test_nothing_else_is_served(self, live, path, host, status):
        assert self.ask(live, path, host)[0] == status

    @needs_chromium
    def test_a_browser_takes_the_next_page_by_itself(self, live, tmp_path, monkeypatch):
        """A sync is committed as soon as the browser has the page of the first."""
        session, make = session_in(tmp_path), live.page
        session.push(step=1)

        def page_and_push() -> bytes:
            made = make()
            if session.version < 2:
                session.push(step=2)
            return made

        monkeypatch.setattr(live, "page", page_and_push)
        dom = in_browser(live.url, tmp_path, milliseconds=10_000)
        assert dom.count("<option ") == 2
        assert f'data-state="{live.state()}"' in dom

    def test_the_command_ends_by_an_interrupt(self, tmp_path):
        push(tmp_path)
        process = subprocess.Popen(
            [sys.executable, "-m", "qerl_sync.cli", "report", str(tmp_path), "--live"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            url = re.search(r"http://127\.0\.0\.1:\d+/", process.stderr.readline())[0]
            with urllib.request.urlopen(url, timeout=20) as answer:
                assert b"Findings" in answer.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.stderr.close()
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(url, timeout=20)

    def test_a_port_in_use(self, live, tmp_path):
        port = live.url.rpartition(":")[2].strip("/")
        assert "--port" in run("report", tmp_path, "--live", "--port", port, code=2)
        assert "--live" in run("report", tmp_path, "--live", "--md", code=2)


@pytest.mark.slow
def test_a_page_of_a_long_run_is_small(tmp_path):
    """1,000 syncs of 60,000 tensors; as many unusual ones as are kept, each with its own trace."""
    record_run(tmp_path, num_syncs=52, num_layers=20_000, unusual=range(36), failed={40})
    last = files.read_lines(tmp_path / files.SYNCS)[-1]
    for version in range(52, 1001):
        line = {**last, "version": version}
        with (tmp_path / files.SYNCS).open("a") as lines:
            lines.write(json.dumps(line) + "\n")
    start = time.process_time()
    run("report", tmp_path)
    assert time.process_time() - start < 60
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 5_000_000
    assert page.count("data-figure=") > 31
    assert "The last 20 of 1,000" in page
    if CHROMIUM is not None:
        loaded = """<script>addEventListener("load", () => setTimeout(() => {
          const [entry] = performance.getEntriesByType("navigation");
          document.body.dataset.milliseconds = Math.round(entry.loadEventEnd);
        }));</script></body>"""
        dom = in_browser(page.replace("</body>", loaded), tmp_path)
        milliseconds = int(re.search(r'data-milliseconds="(\d+)"', dom)[1])
        print(f"\n{len(page.encode()) / 1e6:.1f} MB, loaded in {milliseconds} ms")
        assert milliseconds < 2000


class TestExplain:
    def test_each_error_class_is_explained(self):
        ours = {n for n, c in vars(errors).items() if isinstance(c, type)}
        assert {name for name in ours if name.endswith("Error")} <= {
            *EXPLANATIONS,
            "TransportTimeout",
        }
        assert "TransportTimeout" in EXPLANATIONS

    def test_a_budget_that_is_too_small(self, tmp_path):
        """The line of YAML that is given is one with which the same sync succeeds."""
        assert push(tmp_path, budget_bytes=20) is None
        (failed, *_) = found(tmp_path)
        assert failed["kind"] == "failed"
        assert "nothing was sent" in failed["what"]
        needed = int(re.search(r"budget_bytes: (\d+)", failed["change"])[1])
        assert push(tmp_path, budget_bytes=needed) == 1
        assert push(tmp_path, budget_bytes=needed - 1) is None

    def test_the_order_that_would_help(self, tmp_path):
        assert push(tmp_path, policy="warn") == 1
        (advice,) = found(tmp_path)
        assert advice["kind"] == "advice"
        assert "policy: reorder" in advice["change"]
        assert len(advice["layers"]) == 2
        assert push(tmp_path, policy="reorder") == 1
        assert found(tmp_path) == []

    def test_room_in_shared_memory(self, recorded):
        (failed, *_) = explain(RecordedRun.read(recorded))
        assert failed.change.startswith("sync: {chunk_bytes: 32MiB}")  # of 64 MiB, for two slots
        assert "2 times" in failed.when
        assert not failed.layers

    def test_a_foreign_error(self, tmp_path):
        session = session_in(tmp_path)
        session._transport.fail_at = 2
        with pytest.raises(ConnectionError):
            session.push(step=1)
        (failed,) = found(tmp_path)
        assert failed["what"].startswith("ConnectionError")
        assert failed["said"] == "peer gone"

    def test_an_error_outside_of_a_sync_is_explained_once(self, tmp_path):
        lost = errors.PeerLostError("the engine is gone")
        with pytest.raises(errors.PeerLostError), run_errors_recorded(tmp_path):
            raise lost
        session = session_in(tmp_path)
        session._transport.refuse = lost
        with pytest.raises(errors.PeerLostError), run_errors_recorded(tmp_path):
            session.push()
        assert len(files.read_lines(tmp_path / files.FAILURES)) == 2
        (failed,) = found(tmp_path)
        assert failed["said"] == "the engine is gone"
        assert "vllm.log" in failed["change"]


@pytest.mark.parametrize("command", ["report", "explain"])
class TestRefusals:
    def test_no_run(self, command, tmp_path):
        assert str(tmp_path) in run(command, tmp_path, code=2)
        assert "nowhere" in run(command, tmp_path / "nowhere", code=2)

    def test_a_damaged_file(self, command, tmp_path):
        push(tmp_path)
        (record,) = (tmp_path / "traces").glob("sync-*.json")
        record.write_text("{")
        assert f"{record} is damaged" in run(command, tmp_path, code=2)
        (tmp_path / "syncs.jsonl").write_text('{}\n{"version": 1\n{}\n')
        assert "line 2 of" in run(command, tmp_path, code=2)

    def test_nothing_heavy_is_imported(self, command, recorded):
        code = (
            "import sys; from qerl_sync.cli.main import app;"
            "app(sys.argv[1:], standalone_mode=False);"
            "heavy = {'torch', 'vllm', 'transformers', 'matplotlib'} & set(sys.modules);"
            "assert not heavy, heavy"
        )
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-c", code, command, str(recorded)],
            check=True,
            env=environment,
            timeout=60,
            capture_output=True,
        )


def session_in(directory: Path, **options) -> SyncSession:
    config = SyncConfig.of(record_directory=str(directory), **options)
    return SyncSession(ListSource(interleave(QKV)), HandMadeTransport(), config)


def push(directory: Path, **options) -> int | None:
    """Return the version that was committed; None: the sync was refused."""
    try:
        return session_in(directory, **options).push(step=1).version
    except errors.SyncError:
        return None
