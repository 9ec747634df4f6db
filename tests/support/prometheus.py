"""A real Prometheus: installed, or fetched by scripts/prometheus."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.ports import free_port

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs/metrics"
FETCHED = ROOT / ".prometheus/usr/bin/prometheus"
PROMETHEUS = shutil.which("prometheus") or (str(FETCHED) if FETCHED.exists() else None)

needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="no Prometheus is installed; scripts/prometheus fetches Debian's"
)


class Prometheus:
    def __init__(self, directory: Path, **ports: int) -> None:
        """Scrape these ports, each as a job of that name."""
        self._url = f"http://127.0.0.1:{free_port()}"
        config = {
            "global": {"scrape_interval": "200ms", "evaluation_interval": "200ms"},
            "rule_files": [str(DOCS / "alerts.yml")],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
                for job, port in ports.items()
            ],
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = (directory / "log").open("w")
        self._process = subprocess.Popen(
            [
                str(PROMETHEUS),
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={urllib.parse.urlsplit(self._url).netloc}",
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def get(self, path: str, **parameters: str) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an expression, as they are now."""
        return self.get("query", query=expression)["result"]

    def firing(self) -> set[str]:
        """Return the alerts that fire, or wait for as long as their rule says."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"]}

    def await_series(self, expression: str) -> None:
        wait_until(lambda: bool(self.ask(expression)), expression)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()


def wait_until(holds: Any, what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if holds():
                return
        except OSError:  # it is starting
            pass
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}")
