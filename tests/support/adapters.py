"""Tiny PEFT models whose adapter does something."""

from __future__ import annotations

from typing import Any

import torch

from support.models import make_model


def make_policy(kind: str = "dense", seed: int = 0, base: Any = None, **config: Any) -> Any:
    """A PeftModel in fp32 over version 0 of that kind of model, or over `base`."""
    from peft import LoraConfig, get_peft_model

    given = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **config}
    model = base or make_model(kind, 0)
    policy = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given)).eval()
    step(policy, seed)
    return policy


@torch.no_grad()
def step(policy: Any, seed: int) -> None:
    """Move all that trains, as far as the answers show."""
    torch.manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1)
        elif parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
