"""Which quantised engines can be synced: every scheme that vLLM knows, tried on a small model.

A row is a program of its own: `python -m conformance.receivers NAME OUT`. `scripts/conformance
--receivers` runs the rows and writes docs/quantisation.md.
"""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from support.adapters import make_policy
from support.engines import NEW, OLD, PROMPTS, generate, model_of, start_engine
from support.fingerprint import fingerprint
from support.models import CONFIGS, random_model

from conformance.row import EXACT, NO_START, REFUSED, WRONG, one_line
from qerl_sync import (
    AdapterSource,
    HFSource,
    InProcessTransport,
    SyncConfig,
    SyncError,
    SyncSession,
)
from qerl_sync.worker.compat import quantisation

# A weight's tensors by what follows the module's path, of one linear layer.
Quantiser = Callable[[torch.Tensor], dict[str, torch.Tensor]]
GROUP = 32
# Syncs after the first, to and fro: nothing may drift, nor may parameters move.
REPEATED = 20


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _fp8(weight: torch.Tensor, shape: tuple[int, ...] = (-1, 1)) -> dict[str, torch.Tensor]:
    """Of one scale for each row, or for all."""
    scale = weight.abs().amax(1, keepdim=True) if shape else weight.abs().max()
    scale = scale / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def _fp8_blocks(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs, inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % 128))
    blocks = padded.view(-1, 128, inputs // 128, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    quantised = (blocks / scale[:, None, :, None]).view(padded.shape)[:outputs]
    return {"weight": quantised.to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def _int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values from 0 to 15, of which 8 is zero, and a scale for each group of inputs."""
    groups = weight.view(weight.shape[0], -1, GROUP)
    scale = groups.abs().amax(2) / 7
    values = (groups / scale[..., None]).round().clamp(-8, 7) + 8
    return values.view(weight.shape).to(torch.int32), scale


def _packed(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack eight numbers of the last dimension into each int32."""
    eight = values.view(*values.shape[:-1], -1, 8).to(torch.int64)
    total = sum(eight[..., place] << (4 * i) for i, place in enumerate(order))
    assert isinstance(total, torch.Tensor)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def _wna16(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scale = _int4(weight)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": _packed(values), "weight_scale": scale, "weight_shape": shape}


def _gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scale = _int4(weight)
    outputs, inputs = weight.shape
    zeros = torch.full((inputs // GROUP, outputs), 7)  # one less, as its checkpoints have it
    return {
        "qweight": _packed(values).T.contiguous(),
        "qzeros": _packed(zeros),
        "scales": scale.T.contiguous(),
        "g_idx": (torch.arange(inputs) // GROUP).to(torch.int32),
    }


def _awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scale = _int4(weight)
    outputs, inputs = weight.shape
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": _packed(values.T.contiguous(), order),
        "qzeros": _packed(torch.full((inputs // GROUP, outputs), 8), order),
        "scales": scale.T.contiguous(),
    }


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def _numbers(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "num_bits": bits, "symmetric": True, "strategy": strategy, **more}


# Checkpoints that are quantised already: their configuration, and how a weight is written.
CHECKPOINTS: dict[str, tuple[dict[str, Any], Quantiser]] = {
    "compressed-tensors int8 (W8A8)": (
        _compressed(
            "int-quantized",
            _numbers("int", 8, "channel"),
            _numbers("int", 8, "token", dynamic=True),
        ),
        _int8,
    ),
    "compressed-tensors fp8 (W8A8)": (
        _compressed(
            "float-quantized",
            _numbers("float", 8, "channel"),
            _numbers("float", 8, "token", dynamic=True),
        ),
        _fp8,
    ),
    "compressed-tensors int4 (W4A16)": (
        _compressed("pack-quantized", _numbers("int", 4, "group", group_size=GROUP), None),
        _wna16,
    ),
    "GPTQ int4": (
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        _gptq,
    ),
    "AWQ int4": (
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
        _awq,
    ),
    "fp8, a scale for each tensor": (
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        lambda weight: _fp8(weight, ()),
    ),
    "fp8, blocks of 128": (
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        },
        _fp8_blocks,
    ),
}
# What vLLM quantises itself when it loads: the argument `quantization`, and the kind of model.
ONLINE: dict[str, tuple[str | None, str]] = {
    "none (bfloat16)": (None, "dense"),
    **{
        name: (name, "dense")
        for name in ("fp8", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8", "mxfp4")
    },
    **{
        f"{name}, experts": (name, "moe")
        for name in (
            *("fp8", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8", "mxfp4"),
            *("int8_per_channel_weight_only", "nvfp4_per_token", "experts_int8"),
        )
    },
    "fp8_per_channel, biases": ("fp8_per_channel", "bias"),
    "fp8_per_channel, tied head": ("fp8_per_channel", "tied"),
    "int8_per_channel_weight_only": ("int8_per_channel_weight_only", "dense"),
    "nvfp4_per_token": ("nvfp4_per_token", "dense"),
    "torchao": ("torchao", "dense"),
    "bitsandbytes": ("bitsandbytes", "dense"),
}
ROWS = (*ONLINE, *CHECKPOINTS)


def _config(kind: str) -> Any:
    config = CONFIGS[kind]()
    # Blocks of 128 divide it, and no matrix of the MLP is square.
    config.hidden_size, config.intermediate_size = 128, 256
    return config


def _save(model: Any, directory: Path, name: str) -> Path:
    """Write the model as that row's engine is started from it."""
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.save_pretrained(directory)
    if name not in CHECKPOINTS:
        return directory
    from safetensors.torch import load_file, save_file

    config, quantise = CHECKPOINTS[name]
    file = directory / "model.safetensors"
    save_file(dict(_quantised(load_file(file), quantise)), file, {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    return directory


def _quantised(
    tensors: dict[str, torch.Tensor], quantise: Quantiser
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            yield name, tensor
            continue
        for part, value in quantise(tensor.float()).items():
            scale = value.is_floating_point() and value.itemsize > 1
            # Scales of 8-bit weights are float32 in checkpoints, those of packed ones as the model.
            kept = value.bfloat16() if scale and "weight" not in tensor_kind(quantise) else value
            yield f"{name.removesuffix('weight')}{part}", kept.contiguous()


def tensor_kind(quantise: Quantiser) -> str:
    return "packed" if quantise in (_wna16, _gptq, _awq) else "weight"


def run(name: str, directory: Path) -> dict[str, Any]:
    """Return the row of that scheme."""
    quantization, kind = ONLINE.get(name, (None, "dense"))
    row: dict[str, Any] = {"scheme": name, "full": NO_START, "adapter": NO_START, "reason": ""}
    own = name in CHECKPOINTS
    trainers = {seed: random_model(_config(kind), seed) for seed in (OLD, NEW)}
    if own:  # of the same base; only what trains beside an adapter differs
        trainers[OLD] = copy.deepcopy(trainers[NEW])
        with torch.no_grad():
            for _, norm in _norms(trainers[OLD]):
                norm.add_(torch.randn_like(norm), alpha=0.3)
    paths = {s: _save(trainer, directory / str(s), name) for s, trainer in trainers.items()}
    arguments = {"dtype": "bfloat16", "quantization": quantization}
    lora = {"enable_lora": True, "max_lora_rank": 8}
    engines = {}
    for extra in (lora, {}):
        try:
            engines = {s: start_engine(p, **arguments, **extra) for s, p in paths.items()}
            # Some layers fail only when they are asked.
            before, after = _state(engines[OLD]), _state(engines[NEW])
            break
        except Exception as exc:
            engines = {}
            if not row["reason"]:
                row["reason"] = one_line(exc)
    if not engines:
        return row
    without_lora, row["reason"] = row["reason"], ""
    engine, fresh = engines[OLD], engines[NEW]
    assert before != after, "both versions are the same"
    assert generate(engine) == before[1], "the engine does not repeat itself"

    live, states = copy.deepcopy(trainers[NEW]), {OLD: before, NEW: after}
    try:
        with _session(engine, HFSource(live), verify="checksum") as session:
            report = session.push()
            row["quantisation"] = report.quantisation
            row["full"] = EXACT if _state(engine) == after else WRONG
            places = _places(engine)
            for number in range(REPEATED):
                version = NEW if number % 2 else OLD
                live.load_state_dict(trainers[version].state_dict())
                session.push()
                if _state(engine) != states[version]:
                    row["full"], row["reason"] = WRONG, f"sync {number + 2}: other weights"
                    break
            if _places(engine) != places:
                row["full"], row["reason"] = WRONG, "parameters were moved"
    except Exception as exc:
        refused = isinstance(exc, SyncError) and _state(engine) == before
        row["full"], row["reason"] = REFUSED if refused else WRONG, one_line(exc)

    if without_lora:
        row["adapter"], row["adapter_reason"] = NO_START, f"with enable_lora: {without_lora}"
        return row
    # The attention's layers alone: vLLM serves no adapter of fused experts that has another form.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    policy = make_policy(base=trainers[NEW], seed=3, target_modules=targets)
    for _, norm in _norms(policy):
        norm.requires_grad_(True)
    own_base = "engine" if own else "trainer"
    try:
        with _session(engine, AdapterSource(policy), lora_base=own_base) as session:
            first, second = session.push(1), session.push(2)
        row["quantisation"] = second.quantisation
        row["sent"] = [first.sent_bytes, second.sent_bytes]
        right = _from_files(fresh, policy, directory / "adapter")
        same = generate(engine) == right and right != after[1]
        row["adapter"] = EXACT if same else WRONG
        if not same:
            row["reason"] = "other answers than a fresh engine's with the adapter from a file"
    except Exception as exc:
        row["adapter"] = REFUSED if isinstance(exc, SyncError) else WRONG
        if row["full"] != REFUSED or own:
            row["adapter_reason"] = one_line(exc)
    return row


def _norms(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if n.endswith("layernorm.weight")]


def _session(engine: Any, source: Any, **options: Any) -> SyncSession:
    return SyncSession(source, InProcessTransport(engine), SyncConfig.of(**options))


def _state(engine: Any) -> tuple[dict[str, str], Any]:
    """Return what the engine's kernels hold of the base, and what it answers."""
    held = fingerprint(model_of(engine))
    return {key: value for key, value in held.items() if "lora_" not in key}, generate(engine)


def _places(engine: Any) -> dict[str, int]:
    """Return where the kernels find the base's parameters."""
    held = model_of(engine).named_parameters()
    return {name: p.data_ptr() for name, p in held if "lora_" not in name}


def _from_files(engine: Any, policy: Any, path: Path) -> Any:
    """Return the answers of an engine that loads the adapter as `save_pretrained` writes it."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    policy.save_pretrained(path)
    sampling = SamplingParams(temperature=0, max_tokens=12, detokenize=False, logprobs=0)
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        sampling,
        lora_request=LoRARequest("files", 1, str(path)),
        use_tqdm=False,
    )
    answers = [output.outputs[0] for output in outputs]
    return [
        (list(a.token_ids), [next(iter(at.values())).logprob for at in a.logprobs]) for a in answers
    ]


def page(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return docs/quantisation.md, of rows by version of vLLM."""
    return "\n".join([INTRODUCTION, *(_table(rows, version) for version, rows in found.items())])


def _table(rows: dict[str, dict[str, Any]], version: str) -> str:
    head = (
        f"## vLLM {version}\n\n"
        "| engine | full sync | adapter and norms | layers | reason |\n"
        "|---|---|---|---|---|\n"
    )
    lines = []
    for name in ROWS:
        if (row := rows.get(name)) is None:
            continue
        bits = row.get("quantisation", {}).get("bits", {})
        shown = ", ".join(f"{count} of {n} bits" for n, count in bits.items()) or "-"
        said = row.get("adapter_reason") or row["reason"]
        short = said if len(said) <= 200 else f"{said[:197]}..."
        cell = short.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {name} | {row['full']} | {row['adapter']} | {shown} | {cell} |\n")
    return head + "".join(lines)


INTRODUCTION = """# Which quantised engines can be synced

Written by `scripts/conformance --receivers`. Each row is a process with two real vLLM engines of
one small random model on a CPU, loaded from two checkpoints. *Full sync* brings one engine to the
other's weights, and 20 more take it to and fro; *adapter and norms* then has it serve a LoRA
adapter, with the RMSNorm weights that train beside it in the same sync, as QeRL's noise does
(docs/qerl.md).

*exact*: after each sync all that the kernels hold of the base, and greedy tokens with their
log-probabilities, equal those of the engine that was loaded from that checkpoint, to the bit, and
no parameter has moved in memory; for the adapter, they equal those of that engine with the adapter
loaded from a file. *refused*: an error before the first byte, the engine as it was. *wrong*: the
engine differs. *does not start*: vLLM has no kernel for it on this CPU, or not the package. What
it has goes by the CPU: the rows of 0.32, and those of fp8 by blocks, were run on one with AMX, most
others on one without.
*layers*: how many have weights of how many bits.

- The first rows are quantised by vLLM when it loads (`quantization="fp8_per_channel"` and so on):
  what arrives is quantised anew, and a full sync is exact wherever the engine starts.
- The last ones are checkpoints that were quantised before. vLLM does not quantise what arrives for
  them, so that full syncs are refused. An adapter is served over the engine's own base with
  `sync.lora_base: engine`; for a full sync start the engine from the unquantised checkpoint with a
  scheme of the first kind.
- An engine whose scheme has nothing for the model (`int8_per_channel_weight_only` quantises experts
  only) would silently compute in high precision. It is refused before the first sync.
- `SyncReport.quantisation` says after each sync how many layers have weights of how many bits, and
  why the others are not quantised. None of this ran on a GPU.
"""


def spare_the_reference_loop() -> None:
    """Have torch compute fp8 products itself where it would take oneDNN's reference loop, with
    which a row takes half an hour. The values are the same."""
    if not quantisation.multiplies_fp8_by_reference():
        return
    multiply = torch._scaled_mm

    def by_torch(*arguments: Any, **options: Any) -> torch.Tensor:
        with torch.backends.mkldnn.flags(enabled=False):
            return multiply(*arguments, **options)

    torch._scaled_mm = by_torch


def main(name: str, out: str) -> None:
    started = time.perf_counter()
    spare_the_reference_loop()
    with tempfile.TemporaryDirectory() as directory:
        row = run(name, Path(directory))
    row["seconds"] = round(time.perf_counter() - started, 1)
    Path(out).write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
