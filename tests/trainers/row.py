"""One TRL trainer: built on a tiny model, trained for a few steps, its engine asked at each step.

A program of its own, as an engine leaves its process changed: `python -m trainers.row NAME OUT`.
"""

from __future__ import annotations

import support.environment  # noqa: F401  isort:skip  first: it sets what vLLM reads when imported

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from support.trainers import (
    ENGINE,
    build_gold_trainer,
    build_trainer,
    save_policy,
    varied,
)
from support.witness import Witness

from qerl_sync import SyncError

WORKS, REFUSED, WRONG, FAILS = "works", "refused", "wrong", "fails"
STEPS = 3
LIMIT = 1e-5  # of a log-probability, float32 on both sides

COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "max_completion_length": 8,
}
COLOCATED: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 64}
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"

RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "fields": {"content": {"close_pattern": "<eos>", "content": "text"}},
}

Build = Callable[[Path, Path, Any], Any]


def prompts(**columns: Any) -> Any:
    from datasets import Dataset

    rows = [f"w{i} w{i + 1} =" for i in range(32)]
    return Dataset.from_dict({"prompt": rows, **{k: [v] * 32 for k, v in columns.items()}})


def conversations() -> Any:
    """The same prompts for trainers that apply the tokenizer's chat template to each."""
    from datasets import Dataset

    rows = [[{"role": "user", "content": f"w{i} w{i + 1} ="}] for i in range(32)]
    return Dataset.from_dict({"prompt": rows})


def grpo(policy: Path, directory: Path, callback: Any, **changes: Any) -> Any:
    return build_trainer(
        policy,
        directory,
        [callback],
        reward=varied,
        max_steps=STEPS,
        learning_rate=1e-2,
        **changes,
    )


def gmpo(policy: Path, directory: Path, callback: Any) -> Any:
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    args = GMPOConfig(str(directory), **COMMON, **COLOCATED, num_generations=2)
    return GMPOTrainer(str(policy), varied, args, train_dataset=prompts(), callbacks=[callback])


def rloo(policy: Path, directory: Path, callback: Any) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    args = RLOOConfig(str(directory), **COMMON, **COLOCATED, num_generations=2)
    return RLOOTrainer(str(policy), varied, args, train_dataset=prompts(), callbacks=[callback])


def distillation(policy: Path, directory: Path, callback: Any) -> Any:
    from trl import DistillationConfig, DistillationTrainer

    args = DistillationConfig(str(directory), **COMMON, **COLOCATED)
    return DistillationTrainer(
        str(policy), str(teacher(policy)), args, train_dataset=prompts(), callbacks=[callback]
    )


def sdpo(policy: Path, directory: Path, callback: Any) -> Any:
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    args = SDPOConfig(
        str(directory),
        **COMMON,
        **COLOCATED,
        num_generations=2,
        distillation_weight=0.5,
        max_reprompt_len=32,
    )
    return SDPOTrainer(str(policy), varied, args, prompts(), callbacks=[callback])


def sdft(policy: Path, directory: Path, callback: Any) -> Any:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    args = SDFTConfig(str(directory), **COMMON, **COLOCATED, num_generations=2)
    return SDFTTrainer(str(policy), args, prompts(privileged_context="w1 w2"), callbacks=[callback])


def iw_opd(policy: Path, directory: Path, callback: Any) -> Any:
    from datasets import Dataset
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    args = IWOPDConfig(
        str(directory),
        **COMMON,
        **COLOCATED,
        num_generations=1,
        max_length=48,
        max_prompt_length=32,
    )
    # With an answer, which is not used: TRL divides the loss by the number of its tokens.
    rows = [
        [{"role": "user", "content": f"w{i} w{i + 1} ="}, {"role": "assistant", "content": f"w{i}"}]
        for i in range(32)
    ]
    return IWOPDTrainer(
        str(policy),
        str(teacher(policy)),
        args,
        train_dataset=Dataset.from_dict({"messages": rows}),
        callbacks=[callback],
    )


def gold(policy: Path, directory: Path, callback: Any) -> Any:
    return build_gold_trainer(
        policy, directory, [callback], teacher=teacher(policy), max_steps=STEPS
    )


def online_dpo(policy: Path, directory: Path, callback: Any) -> Any:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    given = {name: value for name, value in COMMON.items() if name != "max_completion_length"}
    args = OnlineDPOConfig(
        str(directory),
        **given,
        use_vllm=True,
        vllm_mode="colocate",
        max_new_tokens=8,
        max_length=48,
    )
    return OnlineDPOTrainer(
        str(policy),
        reward_funcs=varied,
        args=args,
        train_dataset=prompts(),
        processing_class=tokenizer(policy),
        callbacks=[callback],
    )


def async_grpo_lora(policy: Path, directory: Path, transfer: Any) -> Any:
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return async_grpo(policy, directory, transfer, peft_config=adapter)


def async_grpo(policy: Path, directory: Path, transfer: Any, **options: Any) -> Any:
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    args = AsyncGRPOConfig(
        str(directory),
        **COMMON,
        num_generations=2,
        vllm_server_base_url=transfer.server_url,
        max_staleness=8,
    )
    return AsyncGRPOTrainer(
        str(policy),
        varied,
        args,
        train_dataset=conversations(),
        weight_transfer=transfer,
        **options,
    )


def async_distillation(policy: Path, directory: Path, transfer: Any) -> Any:
    from trl.experimental.async_distillation import (
        AsyncDistillationConfig,
        AsyncDistillationTrainer,
    )

    args = AsyncDistillationConfig(
        str(directory),
        **COMMON,
        vllm_server_base_url=transfer.server_url,
        teacher_server_urls={"itself": transfer.server_url},
        teacher_top_k=4,
        max_staleness=8,
        token_budget=0,
        # FlashAttention, which TRL asks for, has no CPU kernel.
        model_init_kwargs={"attn_implementation": "sdpa"},
    )
    return AsyncDistillationTrainer(
        str(policy), args, train_dataset=conversations(), weight_transfer=transfer
    )


def tokenizer(policy: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(policy)


def teacher(policy: Path) -> Path:
    """Save a model of other weights, with the policy's tokenizer."""
    return save_chatting_policy(policy.parent / "teacher", seed=1)


def save_chatting_policy(directory: Path, seed: int = 0) -> Path:
    save_policy(directory, seed=seed)
    words = tokenizer(directory)
    words.chat_template = CHAT_TEMPLATE
    # By which AsyncGRPOTrainer reads a completion; TRL has those of known models.
    words.response_template = RESPONSE_TEMPLATE
    words.save_pretrained(directory)
    return directory


# By the name in the table: how it is built, and what syncs it.
CALLBACK, TRANSFER = "WeightSyncCallback", "AsyncWeightTransfer"
TRAINERS: dict[str, tuple[Build, str]] = {
    "GRPOTrainer": (grpo, CALLBACK),
    "RLOOTrainer": (rloo, CALLBACK),
    "DistillationTrainer": (distillation, CALLBACK),
    "experimental GMPOTrainer": (gmpo, CALLBACK),
    "experimental SDPOTrainer": (sdpo, CALLBACK),
    "experimental SDFTTrainer": (sdft, CALLBACK),
    "experimental GOLDTrainer": (gold, CALLBACK),
    "experimental IWOPDTrainer": (iw_opd, CALLBACK),
    "experimental OnlineDPOTrainer": (online_dpo, CALLBACK),
    "experimental AsyncGRPOTrainer": (async_grpo, TRANSFER),
    "experimental AsyncGRPOTrainer, LoRA": (async_grpo_lora, TRANSFER),
    "experimental AsyncDistillationTrainer": (async_distillation, TRANSFER),
}


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """Replace what the asynchronous trainers need a GPU for, none of which concerns weights: a
    meter of FLOPS and the attention kernel."""
    from trl.experimental.async_distillation import async_distillation_trainer
    from trl.experimental.async_grpo import async_grpo_trainer, packing

    for module in (async_grpo_trainer, async_distillation_trainer):
        module.get_peak_flops_per_device = lambda accelerator, dtype: None
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attention_of_segments)
    yield


def attention_of_segments(
    query: Any, key: Any, value: Any, ends_q: Any, ends_k: Any, *_: Any, **options: Any
) -> Any:
    """Attend causally within each segment, aligned at its end, as FlashAttention does."""
    parts = []
    for i in range(len(ends_q) - 1):
        q = query[ends_q[i] : ends_q[i + 1]].transpose(0, 1)
        k, v = (x[ends_k[i] : ends_k[i + 1]].transpose(0, 1) for x in (key, value))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask.tril(k.shape[1] - q.shape[1]),
                scale=options.get("softmax_scale"),
                enable_gqa=True,
            ).transpose(0, 1)
        )
    return torch.cat(parts)


@contextmanager
def served(policy: Path, log: Path, *, lora: bool) -> Iterator[str]:
    from qerl_sync.serving.command import ServerSpec
    from qerl_sync.serving.server import ServerProcess

    engine: dict[str, Any] = {**ENGINE, "max_model_len": 64, "max_num_seqs": 8}
    if lora:
        # vLLM 0.31 fails where it gives the witness a prompt's logprobs beside other requests and
        # its head could have an adapter (add_lora_logits in vllm/lora/punica_wrapper).
        layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        engine |= {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": layers}
    with ServerProcess(ServerSpec(str(policy), engine), log=log) as server:
        yield server.url


def run(name: str, directory: Path) -> dict[str, Any]:
    """Return the row of that trainer."""
    build, by = TRAINERS[name]
    policy = save_chatting_policy(directory / "policy")
    if by == TRANSFER:
        from qerl_sync.integrations.trl_async import AsyncWeightTransfer

        lora = build is async_grpo_lora
        with on_a_cpu(), served(policy, directory / "vllm.log", lora=lora) as url:
            transfer = AsyncWeightTransfer(url)
            return _row(
                name, by, transfer, Witness(url), lambda: build(policy, directory, transfer)
            )
    from qerl_sync import WeightSyncCallback

    callback = WeightSyncCallback(engine=ENGINE)
    return _row(name, by, callback, Witness(), lambda: build(policy, directory, callback))


def _row(
    name: str, by: str, syncer: Any, witness: Witness, build: Callable[[], Any]
) -> dict[str, Any]:
    row: dict[str, Any] = {"trainer": name, "by": by, "result": FAILS}
    try:
        with witness.watching():
            witness.trainer = trainer = build()
            if by == TRANSFER:
                syncer.bind(trainer)
            trainer.train()
    except SyncError as exc:
        begun = witness.trainer is not None and witness.trainer.state.global_step
        return {**row, "result": FAILS if begun else REFUSED, "reason": one_line(exc)}
    except Exception as exc:
        return {**row, "reason": one_line(exc)}
    steps = [report.step for report in syncer.reports]
    judged = [*witness.after, *(witness.generating if by == CALLBACK else [])]
    row |= {
        "steps": steps,
        "gap": max(judged, default=None),
        "changed": max(witness.before, default=0.0),
        "generations": len(witness.generating),
        "exact": all(report.prediction_exact for report in syncer.reports),
    }
    # A step must have changed the engine's answers: else a sync that does nothing would pass.
    right = len(steps) > 1 and max(judged) <= LIMIT < row["changed"] and row["exact"]
    return {**row, "result": WORKS if right else WRONG, "reason": ""}


def one_line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())}"[:600]


def main(name: str, out: str) -> None:
    started = time.perf_counter()
    torch.set_num_threads(1)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        row = run(name, Path(directory))
    row["seconds"] = round(time.perf_counter() - started, 1)
    Path(out).write_text(json.dumps(row) + "\n")
    sys.stdout.flush()
    os._exit(0)  # whatever thread of an engine or of TRL is left


if __name__ == "__main__":
    main(*sys.argv[1:])
