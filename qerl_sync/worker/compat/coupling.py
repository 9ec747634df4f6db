"""The window of vLLM versions, and every name of vLLM and TRL that qerl-sync depends on.

The window is what was run (docs/install.md says where). An older vLLM is refused. In a newer one
the names below are looked up, feature by feature. `scripts/vllm-features` shows the result.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any, NamedTuple

from qerl_sync.errors import CompatError

OLDEST, BEYOND = (0, 25), (0, 33)
WINDOW = "vllm>={}.{},<{}.{}".format(*OLDEST, *BEYOND)


class Feature(NamedTuple):
    """Name what a part of qerl-sync uses of vLLM or TRL.

    Attributes:
        needed: no sync works without it. Otherwise only the part that is named fails, or does
            without.
        names: by module, attributes separated by spaces. `new|old`: the first that is there is
            used. `owner.a,b`: both attributes of it.
    """

    needed: bool
    names: dict[str, str]


_RELOAD = "vllm.model_executor.model_loader.reload"
_TRANSFER = "vllm.distributed.weight_transfer"
_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector"
_FOUR_METHODS = (
    "init_weight_transfer_engine,start_weight_update,update_weights,finish_weight_update"
)
_RESETS = "reset_prefix_cache,reset_encoder_cache,reset_mm_cache"

FEATURES: dict[str, Feature] = {
    "layerwise reload": Feature(
        True,
        {
            f"{_RELOAD}.layerwise": (
                # LAYERWISE_INFO: per layer, the held tensors, elements loaded, total.
                "LAYERWISE_INFO LOADING_LAYERS record_metadata_for_reloading "
                "initialize_layerwise_reload finalize_layerwise_reload get_layer_tensors "
                "get_layerwise_info get_layer_params_buffers "
                # For each tensor that arrives: the layer it is held for, its elements, whether
                # the layer waits for the end.
                "get_layer_size get_numel_loaded is_deferred_attention_layer|has_device_tensors "
                "_get_weight_loader _get_original_loader "
                # A layer that is whole: processed, copied into its live tensors; put back.
                "_layerwise_process _copy_and_restore_kernel_tensors _place_kernel_tensors"
            ),
            f"{_RELOAD}.meta": (
                "SKIP_TENSORS SKIP_LOAD_TENSORS|SKIP_TENSORS "
                "materialize_meta_tensor materialize_layer to_meta_tensor"
            ),
            # Which buffers are derived. Without it `older_reload` keeps a record of its own.
            f"{_RELOAD}.types": (
                "LayerReloadingInfo.kernel_non_persistent_buffers|LayerReloadingInfo"
            ),
        },
    ),
    "layers of a model": Feature(
        True,
        {
            "vllm.config": "set_current_vllm_config",
            "vllm.platforms": "current_platform",
            "vllm.model_executor.layers.vocab_parallel_embedding": "VocabParallelEmbedding",
            "vllm.model_executor.layers.quantization.base_config": "QuantizeMethodBase",
        },
    ),
    "worker's side of weight transfer": Feature(
        True,
        {
            f"{_TRANSFER}.base": (
                "WeightTransferEngine WeightTransferInitInfo WeightTransferUpdateInfo "
                "WeightTransferInitRequest WeightTransferUpdateRequest"
            ),
            f"{_TRANSFER}.factory": (
                "WeightTransferEngineFactory._registry WeightTransferEngineFactory.register_engine"
            ),
        },
    ),
    "engine calls": Feature(
        True,
        {
            "vllm": f"LLM.{_FOUR_METHODS},generate,sleep,wake_up",
            "vllm.v1.engine.async_llm": (
                f"AsyncLLM.{_FOUR_METHODS},generate,add_request,pause_generation,resume_generation"
            ),
            "vllm.v1.engine.llm_engine": "LLMEngine.add_request,abort_request",
        },
    ),
    "caches": Feature(
        True,
        {
            "vllm.v1.engine.llm_engine": f"LLMEngine.{_RESETS}",
            "vllm.v1.engine.async_llm": f"AsyncLLM.{_RESETS}",
            f"{_CONNECTOR}.factory": "KVConnectorFactory.get_connector_class",
            f"{_CONNECTOR}.v1.base": "KVConnectorBase_V1.reset_cache",
            f"{_CONNECTOR}.v1.multi_connector": "MultiConnector._get_connector_classes_and_configs",
        },
    ),
    "caches of data parallel replicas": Feature(
        False, {"vllm.v1.engine.core_client": "AsyncMPClient._call_utility_async"}
    ),
    "weight versions": Feature(
        False,
        {
            "vllm": "LLM.get_weight_version",
            "vllm.v1.engine.async_llm": "AsyncLLM.get_weight_version",
        },
    ),
    "trainer's side of weight transfer": Feature(
        False,
        {
            f"{_TRANSFER}.base": (
                "TrainerInitInfo TrainerWeightTransferEngine ModuleSource materialize_full_tensor "
                "WeightSource.metadata WeightSource.iter_full|WeightSource.__iter__ "
                "WeightSource.owned_names|WeightSource.held_names"
            ),
            f"{_TRANSFER}.factory": "WeightTransferTrainerFactory._registry",
        },
    ),
    "vLLM's own nccl and ipc engines": Feature(
        False,
        {
            f"{_TRANSFER}.nccl_engine": (
                "NCCLWeightTransferEngine NCCLTrainerWeightTransferEngine NCCLTrainerInitInfo"
            ),
            f"{_TRANSFER}.ipc_engine": (
                "IPCWeightTransferEngine IPCTrainerWeightTransferEngine IPCTrainerInitInfo"
            ),
        },
    ),
    # Besides: `load_model_cls` of the entries of `ModelRegistry.models`.
    "models without an engine": Feature(
        False,
        {
            "vllm": "ModelRegistry.models ModelRegistry.register_model",
            "vllm.engine.arg_utils": "EngineArgs.create_engine_config",
            "vllm.model_executor.model_loader.utils": "initialize_model",
            "vllm.distributed.parallel_state": (
                "GroupCoordinator _node_count init_distributed_environment "
                "initialize_model_parallel"
            ),
        },
    ),
    # Of a worker's runner besides: `execute_model`, `requests`, `input_batch` (its rows' adapters)
    # or `lora_state` and `req_states`; of its `lora_manager`: `vocab_size`.
    "LoRA adapters": Feature(
        False,
        {
            "vllm.config.lora": "MaxLoRARanks",
            "vllm.lora.lora_model": "LoRAModel.from_lora_tensors",
            "vllm.lora.peft_helper": "PEFTHelper",
            "vllm.lora.request": "LoRARequest",
            "vllm.lora.utils": "parse_fine_tuned_lora_name",
            "vllm.lora.model_manager": (
                "LoRAModelManager._create_merged_loras_inplace LRUCacheLoRAModelManager."
                "add_adapter,remove_adapter,activate_adapter,remove_oldest_adapter,capacity"
            ),
            "vllm.lora.worker_manager": "LRUCacheWorkerLoRAManager._load_adapter",
            "vllm.v1.core.sched.output": "NewRequestData.lora_request",
            "vllm.model_executor.models.utils": "PPMissingLayer",
        },
    ),
    # Besides: `group_name` of a `dist_module`, by which the segments are named.
    "shared memory of CPU workers": Feature(
        False,
        {
            "vllm.distributed.parallel_state": "get_tp_group",
            "vllm.distributed.device_communicators.cpu_communicator": (
                "CpuCommunicator _CPUSHMDistributed.make_group_name"
            ),
        },
    ),
    "TRL": Feature(
        False,
        {
            # LLM is there where TRL could import vLLM.
            "trl.generation.vllm_generation": "LLM VLLMGeneration.sync_weights empty_cache",
            "trl.generation.vllm_client": "VLLMClient.init_communicator VLLMClient.generate",
        },
    ),
}


def vllm_version() -> str:
    """Return the installed vLLM's version. Raise CompatError without vLLM."""
    try:
        import vllm
    except ImportError as exc:
        raise CompatError(
            f"vLLM cannot be imported ({exc}); install it (GPU: `pip install '{WINDOW}'`; this "
            "project's CPU set-up: ./scripts/setup)"
        ) from exc
    return str(vllm.__version__)


def require_vllm() -> str:
    """Return the installed vLLM's version.

    Raises:
        CompatError: vLLM is missing, or older than the window. A later one is not refused here.
    """
    version = vllm_version()
    release = re.match(r"(\d+)\.(\d+)", version)
    # Built from a checkout without tags, vLLM calls itself 0.1.dev1: that says nothing of its age.
    untagged = release is None or version.startswith("0.1.dev")
    if release is not None and not untagged and (int(release[1]), int(release[2])) < OLDEST:
        raise CompatError(
            f"vLLM {version} is older than those that qerl-sync runs with, {WINDOW}; install one "
            f"of them: `pip install '{WINDOW}'`",
            version=version,
            window=WINDOW,
        )
    return version


def require(feature: str) -> None:
    """Check that the installed vLLM, or TRL, has all that this feature uses.

    Raises:
        CompatError: naming what is missing, or that vLLM is older than the window.
    """
    version = require_vllm()
    missing = tuple(name for name, found in lookup(feature).items() if not found)
    if missing:
        raise lacking(feature, version, missing)


def lacking(feature: str, version: str, missing: tuple[str, ...]) -> CompatError:
    """Return the error for a vLLM without these names."""
    return CompatError(
        f"vLLM {version} cannot serve qerl-sync's {feature!r}: it has no {', '.join(missing)}; "
        f"install a version with which that was run, of {WINDOW} (docs/install.md), or do without",
        missing=missing,
        version=version,
        window=WINDOW,
    )


def lookup(feature: str) -> dict[str, str]:
    """Return, for each name of a feature with its module, the name that is used; "": none."""
    found = {}
    for module_name, names in FEATURES[feature].names.items():
        try:
            module: Any = import_module(module_name)
        except ImportError:
            module = None
        for word in names.split():
            owner, dot, members = word.rpartition(".")
            for member in members.split(","):
                choices = f"{owner}{dot}{member}".split("|")
                used = (name for name in choices if module is not None and has(module, name))
                found[f"{module_name}.{choices[0]}"] = next(used, "")
    return found


def has(owner: Any, name: str) -> bool:
    """Return whether `owner` has this attribute, or attribute of attributes (`a.b`)."""
    for part in name.split("."):
        if part in getattr(owner, "__dataclass_fields__", ()):
            return True  # a field without a default is no attribute of its class
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True
