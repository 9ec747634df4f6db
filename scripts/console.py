"""What a person sees of set-up, and how its commands are run. Used by environment.py."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

HEARTBEAT_SECONDS = 10

Watch = Callable[[str], str]


class SetupError(Exception):
    """Set-up cannot go on; the message says what to do."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Steps:
    """Runs the steps' commands: output into the log, headings and signs of life on stderr."""

    NUM_STEPS = 4

    def __init__(self, log: Path, lock_file: int):
        self.log = log
        self.lock_file = lock_file
        self.started = time.monotonic()
        self.number = 0

    def begin(self, title: str) -> None:
        self.number += 1
        elapsed = time.monotonic() - self.started
        say(f"[{self.number}/{self.NUM_STEPS}] {elapsed:5.1f} s  {title}")

    def end(self) -> None:
        say(f"set-up done in {time.monotonic() - self.started:.0f} s")

    def run(self, command: list[object], watch: Watch | None = None) -> None:
        """`watch` gets each line of output and, between lines, ""; it returns what to tell."""
        words = [str(word) for word in command]
        lines: list[str] = []
        with self.log.open("a") as log:
            print("$", shlex.join(words), file=log, flush=True)
            # The child holds the lock too: if this process is killed, the next waits for the child.
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=(self.lock_file,),
            )

            def read() -> None:
                for line in process.stdout or ():
                    print(line, end="", file=log, flush=True)
                    lines.append(line)
                    if watch:
                        watch(line)

            reader = threading.Thread(target=read)
            reader.start()
            self._show_life(process, watch or (lambda line: "working"))
            reader.join()
        if process.returncode:
            tail = "".join(lines[-25:]).rstrip()
            raise SetupError(
                f"{tail}\n\nThis failed ({process.returncode}); the whole log: {self.log}"
            )

    def _show_life(self, process: subprocess.Popen[str], watch: Watch) -> None:
        on_terminal = sys.stderr.isatty()
        start, end = ("\r\x1b[K", "") if on_terminal else ("", "\n")
        while True:
            try:
                process.wait(timeout=0.5 if on_terminal else HEARTBEAT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                elapsed = time.monotonic() - self.started
                text = f"      {elapsed:5.1f} s  {watch('')}"
                print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
        if on_terminal:
            print(start, end="", file=sys.stderr, flush=True)
