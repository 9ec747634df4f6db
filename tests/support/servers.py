"""Servers for tests: one that answers as it is told, and a stand-in for vLLM's program."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# Engine arguments of a server that starts as fast as one can.
ENGINE = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "dtype": "float32",
    "num_gpu_blocks_override": 64,
}


def wait_until(condition: Callable[[], Any], seconds: float = 20, *, every: float = 0.05) -> bool:
    """Whether it came true within that time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


class Answers:
    """What a server answers by "METHOD /path", and what it was asked: such lines with the body, and
    the headers."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.by_route: dict[str, tuple[int, str]] = {}
        self.drop_connections = False
        self.hold = threading.Event()
        self.hold.set()


@contextmanager
def answering() -> Iterator[tuple[str, Answers]]:
    """A server on a free port of this machine: its address and its answers."""
    answers = Answers()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body = self.rfile.read(size)
            answers.headers.append(dict(self.headers))
            answers.asked.append((f"{self.command} {self.path}", json.loads(body or "null")))
            answers.hold.wait(timeout=30)
            if answers.drop_connections:
                return
            route = f"{self.command} {self.path.partition('?')[0]}"
            status, text = answers.by_route.get(route, (404, '{"detail": "Not Found"}'))
            self.send_response(status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = handle_any

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", answers
    finally:
        answers.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()


STAND_IN = """
import argparse, http.server, os, signal, subprocess, sys, time

print("arguments:", *sys.argv[1:], flush=True)
parser = argparse.ArgumentParser(prog="api_server.py")
for name in ("--model", "--host", "--weight-transfer-config", "--logprobs-mode", "--max-logprobs"):
    parser.add_argument(name)
parser.add_argument("--middleware")
parser.add_argument("--dtype")
parser.add_argument("--seed")
parser.add_argument("--no-use-tqdm-on-load", action="store_true")
parser.add_argument("--port", type=int)
parser.parse_args()

# An engine core and its worker, the latter out of reach of a signal to the group. Whoever finds
# the server ready finds both of them.
child = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True); "
child += "print('started', flush=True); time.sleep(600)"
core = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
core.stdout.readline()
{before}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

port = int(next(word for word in sys.argv if word.startswith("--port=")).partition("=")[2])
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in_for_vllm(directory: Path, before: str = "") -> Path:
    """A package `vllm` whose server runs `before`, then answers /health. For PYTHONPATH."""
    program = directory / "vllm" / "entrypoints" / "openai" / "api_server.py"
    program.parent.mkdir(parents=True)
    program.write_text(STAND_IN.replace("{before}", before))
    for package in list(program.parents)[:3]:  # a namespace would not hide the real vLLM
        (package / "__init__.py").touch()
    return directory
