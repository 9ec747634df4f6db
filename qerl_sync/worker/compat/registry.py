"""The file that touches vLLM's model registry, for model classes that are built without an engine.

Of `ModelRegistry.models` (architecture -> entry) it also uses the entries' `load_model_cls`.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

# Model files import it to prepare images; no layer map depends on it. vLLM's CPU build does without
# it, since its usual wheels do not load beside a CPU torch.
DISPENSABLE = "torchvision"


def import_model_classes(architectures: Sequence[str]) -> None:
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
