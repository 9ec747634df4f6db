"""The engines that syncs are broken on, one a process of the suite."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from support import remote
from support.engines import ENGINE_ARGUMENTS, NEW, OLD, kernels_in_use
from support.models import CONFIGS, checkpoint_tensors, make_model
from support.vision import change_vision_tower, make_vision_model, picture, save_vision_model
from support.worker_extension import ask_every_worker

from faults.spoilers import Pairs
from faults.triggers import FaultySource, PhasedInProcess, PhasedRemote, Trigger
from qerl_sync import ConfigError, Source, SyncConfig, SyncReport, SyncSession
from qerl_sync.engines.http import HTTPClient
from qerl_sync.serving.middleware import QUIET_SECONDS
from qerl_sync.transports.base import Transport

TIMEOUT_SECONDS = 3.0
CALL_SECONDS = 60.0
# How long a request must have stayed without an answer for it to count as one that waits.
WAITING_SECONDS = 1.5


@dataclass(frozen=True)
class Spec:
    """Which engine, and what it serves. Written as `own process/moe/stock`."""

    engine: str
    model: str
    kernels: str = "stock"

    @classmethod
    def parse(cls, text: str) -> Spec:
        return cls(*text.split("/"))

    def require_possible(self) -> None:
        """Raise ConfigError where there is no such engine, model or kernels."""
        models = [*CONFIGS, "fp8", "vision"]
        known = {"engine": ENGINES, "model": models, "kernels": ["stock", "plain"]}
        for what, names in known.items():
            given = getattr(self, what)
            if given not in names:
                raise ConfigError(f"there is no {what} {given!r}; choose from {', '.join(names)}")
        if self.kernels == "plain" and self.engine != "in process":
            raise ConfigError(
                f"{self}: plain kernels are put in place in this process, where the engine of "
                f"{self.engine!r} does not run; choose 'in process/{self.model}/plain', or stock"
            )

        if (self.engine == "multimodal") != (self.model == "vision"):
            raise ConfigError(
                f"{self}: requests with images are for the model that takes them; choose "
                "multimodal/vision/stock"
            )

    def start(self, directory: Path) -> FaultEngine:
        return ENGINES[self.engine](self, directory)

    def __str__(self) -> str:
        return f"{self.engine}/{self.model}/{self.kernels}"


class FaultEngine(remote.RemoteEngine):
    """An engine on version OLD that syncs are broken on.

    Attributes:
        generations: no second engine is started for what NEW says: it is what this one says from
            empty caches, after the first push that left its kernels as in a fresh one.
    """

    # The first is longer than a block of cached keys, which has 128 tokens on CPU: what vLLM keeps
    # of one request for the next are whole blocks.
    prompts: ClassVar = [[i * 7 % 199 for i in range(150)], [1, 2, 3, 0], [1, 2, 3, 1]]
    in_process = False
    # Whether requests are refused also where the trainer has died and cannot say so.
    outlives_trainers = False

    def __init__(self, spec: Spec, directory: Path) -> None:
        self.spec = spec
        self._waiting: list[threading.Thread] = []
        arguments = ENGINE_ARGUMENTS.get(spec.model, {})
        super().__init__(self.models(), directory, max_model_len=256, **arguments)
        self.tensors = {v: checkpoint_tensors(path) for v, path in self.paths.items()}

    def models(self) -> dict[int, Any]:
        """The trainer's, by version."""
        kind = "dense" if self.spec.model == "fp8" else self.spec.model  # it is vLLM that quantises
        return {version: make_model(kind, version) for version in (OLD, NEW)}

    @property
    def pairs(self) -> Pairs:
        """The checkpoint that faults happen to."""
        return list(self.tensors[NEW].items())

    # ---- syncs

    def transport(self, trigger: Trigger, **options: Any) -> Transport:
        reached = {"transport": "shm", "timeout_seconds": TIMEOUT_SECONDS, **options}
        found = PhasedRemote(self.client(), **reached)
        found.trigger = trigger
        return found

    def session(
        self,
        source: Source,
        trigger: Trigger | None = None,
        transport: Transport | None = None,
        **options: Any,
    ) -> SyncSession:
        # A source in the model's own order, which would open several layers; the default policy
        # sends it so that one is open. Options may keep the order: `injectors.SEVERAL_OPEN`.
        sized = {"chunk_bytes": "64KiB", "timeout_seconds": TIMEOUT_SECONDS}
        config = SyncConfig.of(**{**sized, **options})
        return SyncSession(source, transport or self.transport(trigger or Trigger()), config)

    def push(self, version: int) -> SyncReport:
        """A good sync, in a session of its own."""
        with self.session(FaultySource(self.tensors[version])) as session:
            return session.push()

    def restart(self) -> None:
        with contextlib.suppress(Exception):
            self.close()
        self.start(self.paths[OLD])

    # ---- judging

    def state(self) -> list[dict[str, Any]]:
        """What `WorkerExtension.sync_state` says of each rank."""
        return self.rpc("sync_state")

    def version_held(self) -> int | None:
        """OLD or NEW, if every rank holds exactly that."""
        held = self.rpc("held_weights")
        return next((v for v, fresh in self.weights.items() if fresh == held), None)

    def answer(self) -> tuple[str, str]:
        """What becomes of a request: `answers`, `refuses` or `waits`; and the words."""
        found: list[tuple[str, str]] = []
        thread = threading.Thread(target=lambda: found.append(self._ask()), daemon=True)
        thread.start()
        self._waiting.append(thread)
        thread.join(WAITING_SECONDS)
        for _ in range(100):
            if found or self._is_paused():
                break
            thread.join(0.2)  # slow is not the same as waiting
        return found[0] if found else ("waits", "")

    def _ask(self) -> tuple[str, str]:
        try:
            self.generate()
        except Exception as exc:
            return "refuses", f"{type(exc).__name__}: {exc}"
        return "answers", ""

    def _is_paused(self) -> bool:
        return False

    def generates_as(self, version: int) -> bool:
        """Tokens and logprobs, to the bit. Its kernels must hold that version's weights."""
        while self._waiting:  # requests of a paused engine go on, and must not share a batch
            self._waiting.pop().join(CALL_SECONDS)
        said = self.generate()
        if version not in self.generations:
            emptied = self.empty_caches()
            assert emptied, f"{self.spec}: vLLM does not empty its caches; are requests in flight?"
            self.generations[version] = self.generate()
        return said == self.generations[version]

    def empty_caches(self) -> bool:
        return bool(self.client().reset_caches(running=False))


class OwnProcess(FaultEngine, remote.OwnProcess):
    """A `LLM` whose engine has a process of its own."""


class TensorParallel(FaultEngine, remote.TensorParallel):
    """The same with two worker ranks."""


class DataParallel(FaultEngine, remote.DataParallel):
    """An `AsyncLLM` with two replicas, which hold weights and caches of their own."""

    arguments: ClassVar = {**remote.DataParallel.arguments, "enable_prefix_caching": True}

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        # The client's calls come back from an engine that has died; vLLM's own do not.
        call = partial(ask_every_worker, self.engine, method, *arguments)
        return list(self.client()._run(method, call))

    def _ask(self) -> tuple[str, str]:
        """Of the replicas' answers the worst: one that serves beside one that must not."""
        found = [self._ask_replica(replica) for replica in range(self.num_replicas)]
        return next((answer for answer in found if answer[0] == "answers"), found[0])

    def _ask_replica(self, replica: int) -> tuple[str, str]:
        try:
            self.complete(self.prompts[0], remote.MAX_TOKENS, replica)
        except Exception as exc:
            return "refuses", f"{type(exc).__name__}: {exc}"
        return "answers", ""


class InProcess(FaultEngine, remote.OwnProcess):
    """A `LLM` of this process; tensors go by reference."""

    environment: ClassVar = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    in_process = outlives_trainers = True

    def start(self, path: Path) -> None:
        # To the end of the process: vLLM decides when it processes a layer.
        self._kernels = kernels_in_use(self.spec.kernels)
        self._kernels.__enter__()
        super().start(path)

    @cached_property
    def parts(self) -> Any:
        from qerl_sync.worker.compat import engine as compat

        return compat.in_process_parts(self.llm)

    @property
    def model(self) -> torch.nn.Module:
        return self.parts.model

    def transport(self, trigger: Trigger, **options: Any) -> Transport:
        found = PhasedInProcess(self.llm)
        found.trigger = trigger
        return found

    def answer(self) -> tuple[str, str]:
        return self._ask()

    def close(self) -> None:
        """It ends with its process."""


class Multimodal(InProcess):
    """The same with images. Both versions differ in their vision towers only: what an embedding of
    the other one would say is nothing else's fault."""

    save = staticmethod(save_vision_model)
    # Without the token that stands for an image.
    prompts: ClassVar = [[3 + i * 7 % 199 for i in range(150)], [4, 5, 6, 3], [4, 5, 6, 7]]
    arguments: ClassVar = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1}}

    def __init__(self, spec: Spec, directory: Path) -> None:
        self.inputs = {"multi_modal_data": {"image": picture()}}
        super().__init__(spec, directory)

    def models(self) -> dict[int, Any]:
        old = make_vision_model(0)
        new = copy.deepcopy(old)
        change_vision_tower(new)
        return {OLD: old, NEW: new}

    def empty_caches(self) -> bool:
        """By vLLM's own calls, not by ours, which are judged."""
        engine = self.llm.llm_engine
        engine.reset_mm_cache()
        engine.reset_encoder_cache()
        return bool(engine.reset_prefix_cache())


class Connected(InProcess):
    """The same with a KV connector, whose cache a sync must empty too."""

    def __init__(self, spec: Spec, directory: Path) -> None:
        from support import connectors

        connectors.register()
        (directory / "kv").mkdir()
        transfer = {
            "kv_connector": connectors.ResettableConnector.__name__,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(directory / "kv")},
        }
        self.arguments = {"kv_transfer_config": transfer}
        super().__init__(spec, directory)


class Server(FaultEngine, remote.Server):
    """vLLM's OpenAI server, with our gate in front."""

    outlives_trainers = True

    def client(self) -> Any:
        # With a worker that is stopped, pausing takes that long, and so does resuming after it.
        return HTTPClient(self.process.url, timeout_seconds=CALL_SECONDS / 2)

    def answer(self) -> tuple[str, str]:
        """Of a request that comes when the gate has had time to see that the trainer is gone."""
        deadline = time.monotonic() + QUIET_SECONDS + WAITING_SECONDS
        while self._is_paused() and self._is_ready() and time.monotonic() < deadline:
            time.sleep(0.1)
        return super().answer()

    def _is_paused(self) -> bool:
        return bool(self._get("is_paused").json().get("is_paused"))

    def _is_ready(self) -> bool:
        return bool(self._get("qerl_sync/ready").status_code == 200)

    def _get(self, route: str) -> Any:
        import requests

        return requests.get(f"{self.process.url}/{route}", timeout=CALL_SECONDS)


ENGINES: dict[str, type[FaultEngine]] = {
    "in process": InProcess,
    "own process": OwnProcess,
    "server": Server,
    "tensor parallel": TensorParallel,
    "data parallel": DataParallel,
    "KV connector": Connected,
    "multimodal": Multimodal,
}
