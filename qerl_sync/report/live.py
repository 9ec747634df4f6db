"""Serve a run's page on this machine while the run goes on (`qerl-sync report --live`)."""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from qerl_sync.errors import ConfigError
from qerl_sync.report.recorded import CONFIG, SUMMARY, RecordedRun
from qerl_sync.report.run_page import run_page
from qerl_sync.telemetry.files import TRACES, line_files

ADDRESS = "127.0.0.1"
# Seconds until a silent client is dropped; clients that are answered at a time.
CLIENT_SECONDS, MOST_CLIENTS = 10.0, 16
# How often a page in a browser asks for a newer one.
POLL_SECONDS = 2

# Pointing at a sync, picking one, and "Pause" keep a page: a reload would take it from its reader.
BAR = """\
<div class="bartools">
<span class="keys" id="live" data-state="{state}">Live: a new page comes with each sync.</span>
<span class="switch"><button id="hold" aria-pressed="false">Pause</button></span></div>
<script>
addEventListener("DOMContentLoaded", () => {{
  const live = document.getElementById("live"), hold = document.getElementById("hold");
  const paused = on => {{
    hold.setAttribute("aria-pressed", String(on));
    hold.textContent = on ? "Go on" : "Pause";
  }};
  hold.addEventListener("click", () => paused(hold.getAttribute("aria-pressed") === "false"));
  document.getElementById("pick")?.addEventListener("change", () => paused(true));
  setInterval(async () => {{
    let state;
    try {{
      state = await (await fetch("state", {{signal: AbortSignal.timeout(5000)}})).text();
    }} catch {{
      live.textContent = "The server of this page has ended.";
      return;
    }}
    if (state === live.dataset.state) return;
    const isRead = document.activeElement?.matches(".plot, select");
    if (!isRead && hold.getAttribute("aria-pressed") === "false") location.reload();
    else live.textContent = "There is more: reload.";
  }}, {poll});
}});
</script>
"""

WAITING = """\
<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<title>qerl-sync</title><style>body {font: 15px/1.5 system-ui, sans-serif; margin: 32px}</style>
<h1>Waiting for the first sync</h1>
"""


class LiveReport:
    """An HTTP server with the page of a run, on the loopback address of this machine.

    It answers `/` with the current page, and `/state` with a word that changes with the run's
    files. A page is made once for each state.

    Args:
        port: 0 takes a free one.

    Attributes:
        url: its address.

    Raises:
        ConfigError: the port cannot be opened.
    """

    def __init__(self, directory: Path, port: int = 0) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._page = ("", b"")  # its state, and itself
        self._places = threading.BoundedSemaphore(MOST_CLIENTS)
        try:
            self._server = ThreadingHTTPServer((ADDRESS, port), self._handler())
        except (OSError, OverflowError) as exc:
            raise ConfigError(
                f"--port {port} cannot be opened on {ADDRESS} ({exc}); choose another, or 0 for "
                "any that is free"
            ) from exc
        self.url = f"http://{ADDRESS}:{self._server.server_port}/"

    def serve(self) -> None:
        """Block until `close` is called from another thread, or the caller is interrupted."""
        try:
            self._server.serve_forever(poll_interval=0.2)
        finally:
            self._server.server_close()

    def close(self) -> None:
        """End `serve`. Block until it has ended."""
        self._server.shutdown()

    def state(self) -> str:
        """Return a word that changes when there is something new to show."""
        directory = self._directory
        # A sync's line is written before its record, which takes seconds for a large model. The
        # page is made anew for each, or it would lack the record until the next sync.
        records = sorted((directory / TRACES).glob("sync-*.json"))
        seen = []
        for path in (*line_files(directory), *records, directory / CONFIG, directory / SUMMARY):
            with suppress(FileNotFoundError):  # renamed or removed by the run meanwhile
                stat = path.stat()
                seen.append((path.name, stat.st_size, stat.st_mtime_ns))
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]

    def page(self) -> bytes:
        """Return the page as of now."""
        with self._lock:  # a page of a large run takes seconds of a core: one at a time
            state = self.state()
            if self._page[0] != state:
                bar = BAR.format(state=state, poll=1000 * POLL_SECONDS)
                try:
                    text = run_page(RecordedRun.read(self._directory), bar=bar)
                except (ConfigError, OSError) as exc:  # nothing yet, or it is being moved
                    text = f"{WAITING}<p>{escape(str(exc))}</p>{bar}"
                self._page = (state, text.encode())
            return self._page[1]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        report = self

        class Handler(BaseHTTPRequestHandler):
            timeout = CLIENT_SECONDS
            server_version, sys_version = "qerl-sync", ""

            def do_GET(self) -> None:
                # A page of another site may lead its own name to this address.
                if self.headers.get("Host", "").partition(":")[0] not in (ADDRESS, "localhost"):
                    return self.send_error(403)
                if self.path not in ("/", "/state"):
                    return self.send_error(404)
                if not report._places.acquire(blocking=False):
                    return self.send_error(503)
                try:
                    self._answer(report.page() if self.path == "/" else report.state().encode())
                finally:
                    report._places.release()

            def _answer(self, content: bytes) -> None:
                kind = "text/html" if self.path == "/" else "text/plain"
                self.send_response(200)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler
