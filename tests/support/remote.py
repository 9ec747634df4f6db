"""vLLM engines in other processes, of each kind that there is, started when first needed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar
from unittest import mock

import torch

from qerl_sync import HFSource, Source, SyncConfig, SyncReport, SyncSession
from qerl_sync.build import remote_transport
from qerl_sync.wire import segments
from support import worker_extension
from support.engines import NEW, OLD, SMALL, EnginePool, Subject, start_engine
from support.fingerprint import difference
from support.forks import import_path
from support.models import save_model
from support.servers import wait_until

PROMPTS = [[1, 2, 3, last] for last in range(2)]
MAX_TOKENS = 8
Generation = tuple[list[int], list[float]]  # tokens and the logprob of each
TIMEOUT_SECONDS = 60
START_SECONDS = 600  # of an engine, where a busy machine is slow

ENGINE: dict[str, Any] = {
    "weight_transfer_config": {"backend": "qerl"},
    "worker_extension_cls": worker_extension.NAME,
}


class RemoteEngine(ABC):
    """One engine with the backend `qerl`, on version 0, and what it takes to judge it.

    Args:
        trainers: the trainer's model of each version.
        arguments: more engine arguments.

    Attributes:
        weights: what a fresh engine of that version holds, for each rank.
        generations: what a fresh engine of that version says: this one when it started, and one
            that whoever made this adds for the new version.
    """

    num_workers = 1
    num_replicas = 1
    prompts: ClassVar = PROMPTS
    arguments: Mapping[str, Any] = {}
    save = staticmethod(save_model)

    def __init__(self, trainers: dict[int, Any], directory: Path, **arguments: Any) -> None:
        self.trainers, self.arguments = trainers, {**self.arguments, **arguments}
        self.paths = {
            seed: self.save(model, directory / str(seed)) for seed, model in self.trainers.items()
        }
        self.start(self.paths[OLD])
        self.weights = self.fresh_weights()
        assert self.wrong_weights(OLD) == [], "two fresh engines hold different weights"
        assert self.wrong_weights(NEW) != [], "both versions are the same"
        self.generations: dict[int, list[Generation]] = {OLD: self.generate()}

    def fresh_weights(self) -> dict[int, list[dict[str, str]]]:
        """Load each version beside the engine's own model, by the same worker."""
        return {seed: self.rpc("fresh_weights", str(p)) for seed, p in self.paths.items()}

    @abstractmethod
    def start(self, path: Path) -> None: ...

    @abstractmethod
    def client(self) -> Any:
        """One of qerl_sync.engines."""

    @abstractmethod
    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        """A method of `WorkerExtension` on every rank."""

    @abstractmethod
    def complete(self, prompt: list[int], max_tokens: int) -> Generation:
        """Greedy, to the full length."""

    @abstractmethod
    def close(self) -> None: ...

    def generate(self) -> list[Generation]:
        """One prompt after the other: what else is in a batch changes the last bits."""
        return [self.complete(prompt, MAX_TOKENS) for prompt in self.prompts]

    def generates_as(self, version: int) -> bool:
        """Tokens and logprobs, to the bit."""
        return self.generate() == self.generations[version]

    def gap(self, version: int) -> float:
        """Largest difference between its logprobs and the trainer's."""
        return max(
            gap(self.trainers[version], prompt, generation)
            for prompt, generation in zip(
                self.prompts * self.num_replicas, self.generate(), strict=True
            )
        )

    def wrong_weights(self, version: int) -> list[str]:
        """What the kernels of any rank hold that a fresh engine's do not."""
        held = self.rpc("held_weights")
        assert len(held) == self.num_workers
        return [
            f"rank {rank}: {key}"
            for rank, (has, wants) in enumerate(zip(held, self.weights[version], strict=True))
            for key in difference(has, wants)
        ]

    def leave(self) -> None:
        """Back to version 0, with nothing left behind."""
        if self.wrong_weights(OLD):
            push(self, OLD)
        assert self.wrong_weights(OLD) == [], "the test left the engine unhealable"
        assert own_segments() == [], "shared memory was left behind"


class InProcess(RemoteEngine):
    """A `LLM` of this process: a subject, as tests of the colocated mode have it."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.trainers = subject, subject.trainers
        self.generations = {OLD: self.generate(), NEW: _generate(subject.fresh)}

    @property
    def model(self) -> Any:
        return self.subject.model

    def start(self, path: Path) -> None: ...

    def client(self) -> Any:
        return _llm_client(self.subject.engine)

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        raise NotImplementedError

    def complete(self, prompt: list[int], max_tokens: int) -> Generation:
        return _complete(self.subject.engine, prompt, max_tokens)

    def wrong_weights(self, version: int) -> list[str]:
        return self.subject.wrong_weights(version)

    def close(self) -> None: ...


class OwnProcess(RemoteEngine):
    """A `LLM` whose engine has a process of its own, its worker another one."""

    environment: ClassVar = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    inputs: Mapping[str, Any] = {}  # of each request, beside its prompt

    def start(self, path: Path) -> None:
        with engine_environment(self.environment):
            self.llm = start_engine(path, **ENGINE, **self.arguments)

    def client(self) -> Any:
        return _llm_client(self.llm)

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        # The client's calls come back from an engine that has died; vLLM's own do not.
        return list(self.client()._call("collective_rpc", method, args=arguments))

    def complete(self, prompt: list[int], max_tokens: int) -> Generation:
        return _complete(self.llm, prompt, max_tokens, self.inputs)

    def close(self) -> None:
        _shut_down(self.llm.llm_engine.engine_core)


class TensorParallel(OwnProcess):
    """The same with two worker ranks."""

    num_workers = 2
    environment: ClassVar = {**OwnProcess.environment, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    arguments: ClassVar = {"tensor_parallel_size": 2}


class PipelineParallel(TensorParallel):
    """Each of two worker ranks has half of the layers. vLLM 0.31 starts it on a CPU and fails to
    generate with it (its runner has no intermediate tensors), so that weights alone are judged."""

    arguments: ClassVar = {"pipeline_parallel_size": 2}

    def generate(self) -> list[Generation]:
        return []


class Async(RemoteEngine):
    """An `AsyncLLM` on an event loop in a thread, without a cache of prefixes."""

    def start(self, path: Path) -> None:
        self.loop = asyncio.new_event_loop()
        run = self.loop.run_forever
        self._thread = threading.Thread(target=run, name="engine loop", daemon=True)
        self._thread.start()
        self.engine = self.run(self._start(path), START_SECONDS)

    async def _start(self, path: Path) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        without = {"enable_prefix_caching": False}
        arguments = AsyncEngineArgs(
            model=str(path), **{**without, **SERVED, **ENGINE, **self.arguments}
        )
        with engine_environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}):
            return AsyncLLM.from_engine_args(arguments)

    def run(self, coroutine: Any, seconds: float = 120) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(seconds)

    def client(self) -> Any:
        from qerl_sync.engines.async_llm import AsyncLLMClient

        return AsyncLLMClient(self.engine, self.loop, timeout_seconds=60)

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        return list(self.run(worker_extension.ask_every_worker(self.engine, method, *arguments)))

    def complete(
        self, prompt: list[int], max_tokens: int, replica: int | None = None
    ) -> Generation:
        return self.run(self._stream(prompt, max_tokens, ([], []), replica))

    def stream(
        self, prompt: list[int], max_tokens: int, replica: int | None = None
    ) -> tuple[Any, Generation]:
        """A future, and what has been generated so far: it grows."""
        grown: Generation = ([], [])
        coroutine = self._stream(prompt, max_tokens, grown, replica)
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop), grown

    async def _stream(
        self, prompt: list[int], max_tokens: int, grown: Generation, replica: int | None = None
    ) -> Generation:
        options = _sampling(max_tokens)
        name = f"{time.monotonic_ns()}"
        asked = {"prompt_token_ids": prompt}
        answers = self.engine.generate(asked, options, name, data_parallel_rank=replica)
        async for output in answers:
            tokens, logprobs = _read(output)
            grown[0].extend(tokens[len(grown[0]) :])
            grown[1].extend(logprobs[len(grown[1]) :])
        return grown

    def close(self) -> None:
        try:
            self.run(self._close())
        finally:  # the sockets of an engine that has died would keep a core busy for ever
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.close()

    async def _close(self) -> None:
        handler = self.engine.output_handler
        self.engine.shutdown()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # it raises how one died
            await handler
        _shut_down(self.engine.engine_core)


class DataParallel(Async):
    """The same with two replicas, of one worker each: both generate for each prompt."""

    num_workers = num_replicas = 2
    arguments: Mapping[str, Any] = {"data_parallel_size": 2}

    def generate(self) -> list[Generation]:
        return [
            self.complete(prompt, MAX_TOKENS, replica)
            for replica in range(self.num_replicas)
            for prompt in self.prompts
        ]


class Server(RemoteEngine):
    """vLLM's OpenAI server, with its RL routes."""

    def start(self, path: Path) -> None:
        from qerl_sync.serving.command import ServerSpec
        from qerl_sync.serving.server import ServerProcess

        engine = {**SERVED, "worker_extension_cls": worker_extension.NAME, **self.arguments}
        spec = ServerSpec(str(path), engine=engine)
        self.process = ServerProcess(spec, log=path.parent / "server.log", grace_seconds=5)
        with engine_environment({"PYTHONPATH": import_path()}):
            self.process.__enter__()

    def client(self) -> Any:
        from qerl_sync.engines.http import HTTPClient

        return HTTPClient(self.process.url, timeout_seconds=60)

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        body = {"method": method, "args": list(arguments)}
        return list(self._post("collective_rpc", body).json()["results"])

    def complete(self, prompt: list[int], max_tokens: int) -> Generation:
        answer = self._post("v1/completions", self._request(prompt, max_tokens)).json()
        return of_choice(answer["choices"][0])

    def stream(self, prompt: list[int], max_tokens: int) -> tuple[Any, Generation]:
        """As `Async.stream`."""
        grown: Generation = ([], [])
        pool = ThreadPoolExecutor(1)
        future = pool.submit(self._stream, prompt, max_tokens, grown)
        pool.shutdown(wait=False)
        return future, grown

    def close(self) -> None:
        self.process.stop()

    def _stream(self, prompt: list[int], max_tokens: int, grown: Generation) -> Generation:
        import json

        request = {**self._request(prompt, max_tokens), "stream": True}
        with self._post("v1/completions", request, stream=True) as response:
            for line in response.iter_lines():
                word = line.decode().removeprefix("data: ")
                if word and word != "[DONE]":
                    for target, more in zip(
                        grown, of_choice(json.loads(word)["choices"][0]), strict=True
                    ):
                        target.extend(more)
        return grown

    def _request(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        return completion_request(str(self.paths[OLD]), prompt, max_tokens)

    def _post(self, route: str, body: dict[str, Any], **options: Any) -> Any:
        import requests

        response = requests.post(f"{self.process.url}/{route}", json=body, timeout=60, **options)
        assert response.status_code == 200, response.text
        return response


def completion_request(model: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """For a server: greedy, to the full length."""
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,  # there is no tokenizer
    }


# Engines that serve requests while they are synced: long ones, too.
SERVED = {**SMALL, "max_model_len": 512}

# A kind of model for each, so that experts and shards are met in other processes too.
ENGINES: dict[str, tuple[type[RemoteEngine], str]] = {
    "own process": (OwnProcess, "moe"),
    "tensor parallel": (TensorParallel, "moe"),
    "pipeline parallel": (PipelineParallel, "tied"),
    "async": (Async, "dense"),
    "data parallel": (DataParallel, "dense"),
    "server": (Server, "dense"),
}


class RemotePool:
    """Engines by their names in `ENGINES`, or "in process", kept to the end of the session."""

    def __init__(self, directory: Path, subjects: EnginePool) -> None:
        self._directory = directory
        self._subjects = subjects
        self._engines: dict[tuple[str, ...], RemoteEngine] = {}

    def engine(self, name: str, kind: str = "dense", kernels: str = "stock") -> RemoteEngine:
        key = (name, kind, kernels) if name == "in process" else (name,)
        if key not in self._engines:
            self._engines[key] = self._start(name, kind, kernels)
        return self._engines[key]

    def close(self) -> None:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda engine: engine.close(), self._engines.values()))

    def _start(self, name: str, kind: str, kernels: str) -> RemoteEngine:
        if name == "in process":
            return InProcess(self._subjects.subject(kind, kernels))
        kind_of_engine, kind = ENGINES[name]
        subject = self._subjects.subject(kind, "stock")
        engine = kind_of_engine(subject.trainers, self._directory / name.replace(" ", "-"))
        engine.generations[NEW] = _generate(subject.fresh) * engine.num_replicas
        return engine


def session(engine: RemoteEngine, source: Source, **options: Any) -> SyncSession:
    """A session over `options["transport"]` with as many options of `SyncConfig` as are given."""
    config = SyncConfig.of(**{"timeout_seconds": TIMEOUT_SECONDS, **options})
    return SyncSession(source, remote_transport(config, engine.client()), config)


def push(engine: RemoteEngine, version: int, **options: Any) -> SyncReport:
    """Sync that version of the model in a session of its own."""
    with session(engine, HFSource(engine.trainers[version]), **options) as one:
        return one.push()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    assert wait_until(condition, seconds, every=0.005)


def own_segments() -> list[str]:
    """This process's shared memory that exists now, by name."""
    return sorted(
        path.name for path in segments.DIRECTORY.glob(f"*{segments.PREFIX}{os.getpid()}-*")
    )


def gap(trainer_model: Any, prompt: list[int], generation: Generation) -> float:
    """Largest difference between these logprobs and those that the model has for these tokens."""
    return max(gaps(trainer_model, prompt, generation))


def gaps(trainer_model: Any, prompt: list[int], generation: Generation) -> list[float]:
    """The difference for each token."""
    tokens, logprobs = generation
    with torch.no_grad():
        logits = trainer_model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    right = logits[len(prompt) - 1 : -1].gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return (right - torch.tensor(logprobs)).abs().tolist()


@contextlib.contextmanager
def engine_environment(changes: dict[str, str]) -> Iterator[None]:
    """For the processes that are started in here. vLLM remembers what it has read."""
    from vllm import envs

    envs.disable_envs_cache()
    with mock.patch.dict(os.environ, changes):
        yield


def _shut_down(engine_core: Any) -> None:
    engine_core.shutdown()
    engine_core.ctx.destroy(linger=0)  # vLLM leaves it to the collector, which warns


def _llm_client(llm: Any) -> Any:
    from qerl_sync.engines.llm import LLMClient

    return LLMClient(llm, timeout_seconds=60)


def _sampling(max_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=0
    )


def _generate(llm: Any) -> list[Generation]:
    return [_complete(llm, prompt, MAX_TOKENS) for prompt in PROMPTS]


def _complete(
    llm: Any, prompt: list[int], max_tokens: int, inputs: Mapping[str, Any] = MappingProxyType({})
) -> Generation:
    asked = {"prompt_token_ids": prompt, **inputs}
    (output,) = llm.generate([asked], _sampling(max_tokens), use_tqdm=False)
    return _read(output)


def _read(output: Any) -> Generation:
    one = output.outputs[0]
    return list(one.token_ids), [next(iter(step.values())).logprob for step in one.logprobs]


def of_choice(choice: dict[str, Any]) -> Generation:
    return list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])
