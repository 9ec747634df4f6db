"""KV connectors of the tests' own, registered through vLLM's factory."""

from __future__ import annotations

import shutil
from pathlib import Path

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector


class ResettableConnector(ExampleConnector):
    """vLLM's own connector to a folder, which can be emptied. `answers`: what a reset returns."""

    answers: bool = True

    def reset_cache(self) -> bool | None:
        if self.answers:
            for entry in Path(self._storage_path).iterdir():
                shutil.rmtree(entry)
        return self.answers


def register() -> None:
    if "ResettableConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "ResettableConnector", __name__, "ResettableConnector"
        )
