"""A LoRA adapter in a live engine, served to every request that names none of its own.

vLLM chooses an adapter by the request. Requests come from anywhere (TRL, a server's clients, Ray
actors), so the worker fills the choice in: see `serve`. `coupling` lists the names of vLLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any, get_args

import torch

from qerl_sync.errors import CompatError, ConfigError, CoverageError
from qerl_sync.plan.adapter import Adapter
from qerl_sync.worker.compat.coupling import require
from qerl_sync.worker.compat.engine import EngineParts

# Beyond the ids that people number their adapters with, and within vLLM's int32.
ADAPTER_ID = 2**31 - 2
_NAME = "qerl-sync"
_SERVED = "_qerl_sync_lora_request"
# Of our wrapper of the runner's `execute_model`. `functools.wraps` hands it on to wrappers of that.
_FILLS_IN = "_qerl_sync_fills_in"


def calling_runner(model: torch.nn.Module) -> Any:
    """Return the runner of the vLLM worker that is making a weight transfer engine; None if none.

    vLLM hands such an engine the model, and the runner is an attribute of the worker, which is
    `self` where it is made.
    """
    frame = inspect.currentframe()
    while frame is not None:
        runner = getattr(frame.f_locals.get("self"), "model_runner", None)
        if runner is not None and hasattr(runner, "get_model") and runner.get_model() is model:
            return runner
        frame = frame.f_back
    return None


def smallest_max_rank(rank: int) -> int:
    """Return the smallest `max_lora_rank` of vLLM's for this rank; the rank where it has none."""
    from vllm.config.lora import MaxLoRARanks

    return min((known for known in get_args(MaxLoRARanks) if known >= rank), default=rank)


def require_servable(parts: EngineParts, adapter: Adapter) -> None:
    """Build the adapter with zeros, and drop it. Refuse it if vLLM would not serve it as it is.

    Raises:
        ConfigError: the engine was started without adapters. Or the rank is above `max_lora_rank`;
            `rank`, `max_lora_rank`. Or a layer of the adapter is none that vLLM adds adapters to;
            `layers` names them.
        CompatError: this vLLM's worker does not show its runner.
        CoverageError: a layer lacks a factor, or its factors have other sizes than vLLM's layer;
            `tensor`.
    """
    config, runner = parts.vllm_config.lora_config, parts.runner
    if config is None:
        raise ConfigError(
            "the adapter cannot be served: the engine was started without enable_lora; start it "
            "with enable_lora=True and max_lora_rank (`--enable-lora --max-lora-rank N` of a "
            "server)"
        )
    if not hasattr(runner, "execute_model") or not hasattr(runner, "lora_manager"):
        raise CompatError(
            "the adapter cannot be served: this vLLM's worker does not show the runner whose "
            "requests the adapter is for"
        )
    if adapter.rank > config.max_lora_rank:
        raise ConfigError(
            f"the adapter has rank {adapter.rank}, and the engine serves max_lora_rank "
            f"{config.max_lora_rank}; start it with max_lora_rank={adapter.rank} or the next that "
            "vLLM has",
            rank=adapter.rank,
            max_lora_rank=config.max_lora_rank,
        )
    zeros = {meta.name: torch.zeros(meta.shape, dtype=config.lora_dtype) for meta in adapter.metas}
    made = build_adapter(parts, adapter, zeros)
    manager = runner.lora_manager._adapter_manager
    packed = {part: whole for whole, parts in manager.packed_modules.items() for part in parts}
    _require_sizes(manager, made)
    mapper = _name_mapper(manager)
    unserved = tuple(
        name
        for name in (_vllm_name(name, mapper) for name in adapter.scalings)
        if packed.get(name, name) not in manager.modules and not _is_elsewhere(manager.model, name)
    )
    if unserved:
        raise ConfigError(
            f"vLLM's {type(manager.model).__name__} adds no adapter to {unserved[0]!r}"
            + (f" and {len(unserved) - 1} more layers" if len(unserved) > 1 else "")
            + "; leave it out of LoraConfig.target_modules (and of the engine's "
            "lora_target_modules, if that is set, do not)",
            layers=unserved,
        )


def build_adapter(parts: EngineParts, adapter: Adapter, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return vLLM's `LoRAModel` of these tensors, packed for its layers, not yet in use.

    Called at each sync: what `require_servable` has found of the adapter is not looked at again.

    Raises:
        CoverageError: a layer lacks a factor; `tensor`.
    """
    require("LoRA adapters")
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    worker_manager = parts.runner.lora_manager
    manager = worker_manager._adapter_manager
    mapper = _name_mapper(manager)
    # vLLM's helper knows one scaling for all layers. Each gets its own below.
    helper = PEFTHelper(r=adapter.rank, lora_alpha=adapter.rank, target_modules=[])
    made = LoRAModel.from_lora_tensors(
        lora_model_id=ADAPTER_ID,
        tensors=dict(tensors),
        peft_helper=helper,
        device="cpu",
        dtype=parts.vllm_config.lora_config.lora_dtype,
        model_vocab_size=worker_manager.vocab_size,
        weights_mapper=mapper,
    )
    scaling_of = {_vllm_name(name, mapper): scale for name, scale in adapter.scalings.items()}
    for name, layer in made.loras.items():
        if layer.lora_a is None or layer.lora_b is None:
            raise CoverageError(f"the adapter's layer {name!r} lacks a factor", tensor=name)
        layer.scaling = scaling_of[name]
    manager._create_merged_loras_inplace(made)
    return made


def _name_mapper(manager: Any) -> Any:
    mapper: Any = getattr(manager.model, "hf_to_vllm_mapper", None)
    return mapper.get_rename_mapper() if hasattr(mapper, "get_rename_mapper") else mapper


def _require_sizes(manager: Any, made: Any) -> None:
    """Hold the factors against vLLM's layers: smaller ones would fill a part of them, silently.

    Where a rank has a part of a layer (tensor parallelism), and of embeddings, heads and experts,
    vLLM's own copy has to tell.
    """
    for name, layer in made.loras.items():
        module = manager.modules.get(name)
        slots_a, slots_b = (_slots(module, layer, kind) for kind in ("lora_a", "lora_b"))
        for (slot_a, a), (slot_b, b) in zip(slots_a, slots_b, strict=False):
            if a is None:
                continue
            got, expected = (a.shape[1], b.shape[0]), (slot_a.shape[-1], slot_b.shape[-2])
            if got != expected or a.shape[0] != b.shape[1]:
                raise CoverageError(
                    f"the adapter's factors for {name!r} are {list(a.shape)} and {list(b.shape)}, "
                    f"and vLLM's layer takes {expected[0]} inputs and has {expected[1]} outputs: "
                    "the engine has another base model than the trainer",
                    tensor=name,
                    expected=expected,
                    got=got,
                )


def _slots(module: Any, layer: Any, kind: str) -> list[tuple[torch.Tensor, Any]]:
    """Return vLLM's slots for these factors, each with its factor of the adapter's layer, or None.

    Empty for experts, for layers that the rank has a part of, and where vLLM divides the adapter's
    factors among its own.
    """
    slots: Any = getattr(module, f"{kind}_stacked", None)
    if not isinstance(slots, tuple) or getattr(module, "tp_size", 2) > 1:
        return []
    given: Any = [None] * len(slots) if layer is None else getattr(layer, kind)
    factors = given if isinstance(given, list) else [given]
    if len(factors) != len(slots):
        return []
    return [(slot, f) for slot, f in zip(slots, factors, strict=True) if slot.dim() == 4]


def _is_elsewhere(model: Any, layer: str) -> bool:
    """Return whether another stage of the pipeline has this layer."""
    from vllm.model_executor.models.utils import PPMissingLayer

    module = model
    for part in layer.split("."):
        module = getattr(module, part, None)
        if isinstance(module, PPMissingLayer):
            return True
    return False


def _vllm_name(layer: str, mapper: Any) -> str:
    from vllm.lora.utils import parse_fine_tuned_lora_name

    return str(parse_fine_tuned_lora_name(f"{layer}.lora_A.weight", mapper)[0])


def served_adapter(runner: Any) -> Any:
    """Return the `LoRAModel` that `serve` has set; None if requests get the base model."""
    served = vars(runner).get(_SERVED)
    return None if served is None else served[1]


def serve(runner: Any, lora_model: Any) -> None:
    """Have every request that names no adapter computed with this one. None: with none.

    vLLM's slots are written here: call it when no step runs. The runner's `execute_model` gives new
    requests the adapter before vLLM's batch, its kernels' metadata and its choice of a CUDA graph
    see them; those in flight get it here. If vLLM drops the adapter from its cache for another one
    it finds it again in memory.
    """
    worker_manager = runner.lora_manager
    manager = worker_manager._adapter_manager
    manager.remove_adapter(ADAPTER_ID)
    # Its metadata names slots, and the adapter may get another one.
    manager._last_mapping = None
    if lora_model is None:
        if vars(runner).pop(_SERVED, None) is not None:
            _give_requests_in_flight(runner, None)
        return
    if len(manager) + 1 > manager.capacity:
        manager.remove_oldest_adapter()
    manager.add_adapter(lora_model)
    manager.activate_adapter(ADAPTER_ID)
    _fill_in(runner, worker_manager)
    from vllm.lora.request import LoRARequest

    # vLLM insists on a path. Nothing is ever read from there.
    request = LoRARequest(_NAME, ADAPTER_ID, "/nonexistent/qerl-sync-holds-it-in-memory")
    vars(runner)[_SERVED] = (request, lora_model)
    _give_requests_in_flight(runner, request)


def wrongly_held(runner: Any, lora_model: Any) -> str:
    """Return the first layer whose slot does not hold the served adapter's factors; empty if none.

    Looks at linear layers that this rank has whole.
    """
    manager = runner.lora_manager._adapter_manager
    index = manager.lora_index_to_id.index(ADAPTER_ID)
    for name, module in manager.modules.items():
        layer = lora_model.get_lora(name)
        for kind in ("lora_a", "lora_b"):
            for slot, factor in _slots(module, layer, kind):
                wanted = torch.zeros_like(slot[index, 0], device="cpu")
                if factor is not None:
                    wanted[: factor.shape[0], : factor.shape[1]] = factor
                if not slot[index, 0].cpu().equal(wanted):
                    return str(name)
    return ""


def _fill_in(runner: Any, worker_manager: Any) -> None:
    """Wrap, once, the calls by which the runner gets requests and their adapters."""
    # Not whether the runner has an `execute_model` of its own: that may be another tool's wrapper,
    # and requests would silently be computed with the base model.
    if hasattr(runner.execute_model, _FILLS_IN):
        return
    execute_model, load_adapter = runner.execute_model, worker_manager._load_adapter

    @wraps(execute_model)
    def with_adapter(scheduler_output: Any, *args: Any, **options: Any) -> Any:
        served = vars(runner).get(_SERVED)
        if served is not None:
            for request in scheduler_output.scheduled_new_reqs:
                if request.lora_request is None:
                    request.lora_request = served[0]
        return execute_model(scheduler_output, *args, **options)

    @wraps(load_adapter)
    def from_memory(request: Any) -> Any:
        served = vars(runner).get(_SERVED)
        if served is not None and request.lora_int_id == ADAPTER_ID:
            return served[1]
        return load_adapter(request)

    setattr(with_adapter, _FILLS_IN, True)
    runner.execute_model = with_adapter
    worker_manager._load_adapter = from_memory


def _give_requests_in_flight(runner: Any, request: Any) -> None:
    """Exchange the adapter of the requests that the runner knows: from none to `request`, or back.

    vLLM's runners keep it in two ways: the older one in the request's state and, by row, in the
    batch; the newer one in a `LoraState`.
    """
    state = getattr(runner, "lora_state", None)
    if state is not None:
        for req_id, index in runner.req_states.req_id_to_index.items():
            if _is_ours(state.lora_requests.get(req_id)):
                state.remove_request(req_id)
                state.add_request(req_id, index, request)
        return
    batch = runner.input_batch
    for req_id, known in runner.requests.items():
        if not _is_ours(known.lora_request):
            continue
        known.lora_request = request
        index = batch.req_id_to_index.get(req_id)
        if index is None:
            continue
        batch.lora_id_to_request_ids.get(ADAPTER_ID, set()).discard(req_id)
        batch.request_lora_mapping[index] = 0 if request is None else ADAPTER_ID
        if request is not None:
            batch.lora_id_to_request_ids.setdefault(ADAPTER_ID, set()).add(req_id)
            batch.lora_id_to_lora_request[ADAPTER_ID] = request
    if request is None:
        batch.lora_id_to_request_ids.pop(ADAPTER_ID, None)
        batch.lora_id_to_lora_request.pop(ADAPTER_ID, None)


def _is_ours(request: Any) -> bool:
    return request is None or request.lora_int_id == ADAPTER_ID
