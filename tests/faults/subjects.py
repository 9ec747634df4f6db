"""The engines that syncs are broken on, one a process of the suite."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from support.models import CONFIGS, checkpoint_tensors, make_model, save_model

from faults import extension
from faults.triggers import Checkpoint, PhasedInProcess, PhasedTransport, Trigger
from qerl_sync.clients.http import HTTPClient
from qerl_sync.clients.llm import LLMClient
from qerl_sync.config import SyncConfig
from qerl_sync.errors import ConfigError, SyncError
from qerl_sync.serving.command import ServerSpec
from qerl_sync.serving.gate import QUIET_SECONDS
from qerl_sync.serving.server import ServerProcess
from qerl_sync.session import SyncReport, SyncSession
from qerl_sync.sources.base import Source
from qerl_sync.transports.base import Transport
from qerl_sync.wire.channel import TOKEN_VARIABLE

OLD, NEW = 0, 1  # seeds of the two versions of a model
# The first is longer than a block of cached keys, which has 128 tokens on CPU: what vLLM keeps of
# one request for the next are whole blocks.
PROMPTS = [[i * 7 % 199 for i in range(150)], *([1, 2, 3, last] for last in range(2))]
MAX_TOKENS = 6
TIMEOUT_SECONDS = 3.0
CALL_SECONDS = 60.0
# How long a request must have stayed without an answer for it to count as one that waits.
WAITING_SECONDS = 1.5

Generation = tuple[list[int], list[float]]

ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "dtype": "float32",
    "disable_log_stats": True,
    "num_gpu_blocks_override": 16,
}
KERNELS = ("stock", "plain")
OURS = {
    "weight_transfer_config": {"backend": "qerl"},
    "worker_extension_cls": extension.NAME,
}
BY_MODEL: dict[str, dict[str, Any]] = {
    "fp8": {"quantization": "fp8_per_channel", "dtype": "bfloat16"}
}


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
        """Raises ConfigError where there is no such engine, model or kernels."""
        known = {"engine": [*SUBJECTS], "model": [*CONFIGS, *BY_MODEL], "kernels": [*KERNELS]}
        for what, names in known.items():
            given = getattr(self, what)
            if given not in names:
                raise ConfigError(f"there is no {what} {given!r}; choose from {', '.join(names)}")
        if self.kernels == "plain" and self.engine != "in process":
            raise ConfigError(
                f"{self}: plain kernels are put in place in this process, where the engine of "
                f"{self.engine!r} does not run; choose 'in process/{self.model}/plain', or stock"
            )

    def __str__(self) -> str:
        return f"{self.engine}/{self.model}/{self.kernels}"


class Subject(ABC):
    """An engine on version OLD, and what is right for each version.

    Attributes:
        fresh: by version, what the kernels of an engine of that version hold, on each rank. It is
            loaded beside the engine's own model.
        generations: by version, what it says. Of OLD, before anything was pushed. Of NEW, after the
            first push that left the kernels as in `fresh`, and from empty caches: no second engine
            is started for it.
    """

    num_workers = 1
    remote = True
    # Whether requests are refused also where the trainer has died and cannot say so.
    outlives_trainers = False

    def __init__(self, spec: Spec, directory: Path) -> None:
        self.spec, self.directory = spec, directory
        kind = "dense" if spec.model == "fp8" else spec.model  # it is vLLM that quantises
        self.paths = {v: save_model(make_model(kind, v), directory / str(v)) for v in (OLD, NEW)}
        self.tensors = {v: checkpoint_tensors(path) for v, path in self.paths.items()}
        self.arguments = {**ENGINE, **BY_MODEL.get(spec.model, {})}
        self._waiting: list[threading.Thread] = []
        self.start()
        self.fresh = {v: self.ask("fault_fresh", str(path)) for v, path in self.paths.items()}
        self.generations: dict[int, Any] = {OLD: self.generate()}

    # ---- what differs between engines

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def client(self) -> Any: ...

    @abstractmethod
    def ask(self, method: str, *arguments: Any) -> list[Any]:
        """A method of `extension.Inspector`, on every rank."""

    @abstractmethod
    def complete(self, prompt: list[int]) -> Generation: ...

    @abstractmethod
    def stop(self) -> None: ...

    # ---- syncs

    def transport(self, trigger: Trigger, carrier: str = "shm") -> Transport:
        found = PhasedTransport(self.client(), transport=carrier, timeout_seconds=TIMEOUT_SECONDS)
        found.trigger = trigger
        return found

    def session(
        self, source: Source, trigger: Trigger | None = None, **options: Any
    ) -> SyncSession:
        # A source in the model's own order, which would open several layers; the default policy
        # sends it so that one is open. Options may keep the order: `acts.SEVERAL_OPEN`.
        config = SyncConfig.of(
            **{"chunk_bytes": "64KiB", "timeout_seconds": TIMEOUT_SECONDS, **options}
        )
        return SyncSession(source, self.transport(trigger or Trigger()), config)

    def push(self, version: int) -> SyncReport:
        """A good sync, in a session of its own."""
        with self.session(Checkpoint(self.tensors[version])) as session:
            return session.push()

    # ---- judging

    def generate(self) -> list[Generation]:
        """One prompt after the other: what else is in a batch changes the last bits."""
        return [self.complete(prompt) for prompt in PROMPTS]

    def held(self) -> list[dict[str, str]]:
        return self.ask("fault_held")

    def state(self) -> list[dict[str, Any]]:
        return self.ask("fault_state")

    def weight_versions(self) -> list[int]:
        """What each rank has committed last."""
        return [state["version"] for state in self.state()]

    def version_held(self) -> int | None:
        """OLD or NEW, if every rank holds exactly that."""
        held = self.held()
        return next((v for v, fresh in self.fresh.items() if fresh == held), None)

    def answer(self) -> tuple[str, str]:
        """What becomes of a request: `answers`, `refuses` or `waits`; and the words."""
        found: list[tuple[str, str]] = []

        def ask() -> None:
            try:
                self.generate()
            except Exception as exc:
                found.append(("refuses", f"{type(exc).__name__}: {exc}"))
            else:
                found.append(("answers", ""))

        return self._within(ask, found)

    def _within(self, ask: Callable[[], None], found: list[tuple[str, str]]) -> tuple[str, str]:
        thread = threading.Thread(target=ask, name="a request", daemon=True)
        thread.start()
        self._waiting.append(thread)
        thread.join(WAITING_SECONDS)
        for _ in range(100):
            if found or self._is_paused():
                break
            thread.join(0.2)  # slow is not the same as waiting
        return found[0] if found else ("waits", "")

    def _is_paused(self) -> bool:
        return False

    def judge_generation(self, version: int) -> bool:
        """Is it what that version says? Its kernels must hold that version's weights."""
        while self._waiting:  # requests of a paused engine go on, and must not share a batch
            self._waiting.pop().join(CALL_SECONDS)
        said = self.generate()
        if version not in self.generations:
            self.generations[version] = self._say_afresh()
        return bool(said == self.generations[version])

    def _say_afresh(self) -> list[Generation]:
        """What it says when nothing is left in its caches."""
        if not self.client().reset_caches(running=False):
            raise SyncError(f"{self.spec}: vLLM does not empty its caches; are requests in flight?")
        return self.generate()

    def restart(self) -> None:
        with contextlib.suppress(Exception):
            self.stop()
        self.start()


class InProcess(Subject):
    """A `LLM` of this process; tensors go by reference."""

    remote = False
    outlives_trainers = True

    def start(self) -> None:
        with _kernels(self.spec.kernels):
            self.llm = _llm(self.paths[OLD], **self.arguments, **OURS)

    @cached_property
    def parts(self) -> Any:
        from qerl_sync.worker import compat

        return compat.in_process_parts(self.llm)

    def client(self) -> Any:
        return LLMClient(self.llm, timeout_seconds=CALL_SECONDS)

    def transport(self, trigger: Trigger, carrier: str = "inproc") -> Transport:
        if carrier != "inproc":
            return super().transport(trigger, carrier)
        found = PhasedInProcess(self.llm)
        found.trigger = trigger
        return found

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        return list(self.llm.collective_rpc(method, args=arguments))

    def complete(self, prompt: list[int]) -> Generation:
        return _complete(self.llm, prompt)

    def answer(self) -> tuple[str, str]:
        try:
            self.generate()
        except Exception as exc:
            return "refuses", f"{type(exc).__name__}: {exc}"
        return "answers", ""

    def stop(self) -> None:
        """It ends with its process."""


class OwnProcess(Subject):
    """A `LLM` whose engine has a process of its own."""

    extra: ClassVar[dict[str, Any]] = {}

    def start(self) -> None:
        self.llm = _llm(self.paths[OLD], **self.arguments, **OURS, **self.extra)

    def client(self) -> Any:
        return LLMClient(self.llm, timeout_seconds=CALL_SECONDS)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        # The client's calls come back from an engine that has died; vLLM's do not.
        return list(self.client()._call("collective_rpc", method, args=arguments))

    def complete(self, prompt: list[int]) -> Generation:
        return _complete(self.llm, prompt)

    def stop(self) -> None:
        core = self.llm.llm_engine.engine_core
        core.shutdown()
        core.ctx.destroy(linger=0)


class TensorParallel(OwnProcess):
    """The same with two worker ranks."""

    num_workers = 2
    extra: ClassVar[dict[str, Any]] = {"tensor_parallel_size": 2}


class Server(Subject):
    """vLLM's OpenAI server, with our gate in front."""

    outlives_trainers = True

    def start(self) -> None:
        engine = {**self.arguments, "worker_extension_cls": extension.NAME}
        spec = ServerSpec(str(self.paths[OLD]), engine=engine)
        self.process = ServerProcess(spec, log=self.directory / "server.log", grace_seconds=5)
        self.process.__enter__()

    def client(self) -> Any:
        # With a worker that is stopped, pausing takes that long, and so does resuming after it.
        return HTTPClient(self.process.url, timeout_seconds=CALL_SECONDS / 2)

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        body = {"method": method, "args": list(arguments)}
        return list(self._post("collective_rpc", body)["results"])

    def complete(self, prompt: list[int]) -> Generation:
        request = {
            "model": str(self.paths[OLD]),
            "prompt": prompt,
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # there is no tokenizer
        }
        choice = self._post("v1/completions", request)["choices"][0]
        return list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])

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

    def stop(self) -> None:
        self.process.stop()

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        import requests

        url = f"{self.process.url}/{route}"
        response = requests.post(url, json=body, timeout=CALL_SECONDS)
        if response.status_code != 200:
            raise SyncError(f"{route}: {response.status_code}: {response.text[:300]}")
        return response.json()


SUBJECTS: dict[str, type[Subject]] = {
    "in process": InProcess,
    "own process": OwnProcess,
    "server": Server,
    "tensor parallel": TensorParallel,
}


def environment_of(spec: Spec) -> dict[str, str]:
    """What vLLM reads when it is imported."""
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if spec.engine == "in process" else "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if spec.engine == "tensor parallel" else "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # Of the user's servers: here everybody asks workers what they hold.
    inherited = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    return {**inherited, **own}


@contextlib.contextmanager
def _kernels(kernels: str) -> Iterator[None]:
    """`stock`: CPU kernels pack weights into handles of their own. `plain`: parameters are used as
    they are, as by unquantised GPU kernels; for the rest of the process, since vLLM decides when it
    processes a layer."""
    if kernels == "plain":
        from support.reloads import use_plain_kernels

        use_plain_kernels()
    yield


def _llm(path: Path, **arguments: Any) -> Any:
    from vllm import LLM

    return LLM(model=str(path), **arguments)


def _complete(llm: Any, prompt: list[int]) -> Generation:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False, logprobs=0
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    one = output.outputs[0]
    return list(one.token_ids), [next(iter(step.values())).logprob for step in one.logprobs]
