"""Engines whose head shares the embeddings' parameter, and trainers that send both."""

from __future__ import annotations

import copy

import pytest
import torch
from support.engines import NEW, OLD, logprob_gap
from support.syncs import push, session

from qerl_sync import HFSource
from qerl_sync.errors import CoverageError

pytestmark = pytest.mark.vllm

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def with_own_head(one):
    """A trainer of the new version whose head is a parameter of its own, with the same values."""
    trainer = copy.deepcopy(one.trainers[NEW])
    trainer.lm_head.weight = torch.nn.Parameter(trainer.lm_head.weight.detach().clone())
    assert {HEAD, EMBEDDINGS} <= {meta.name for meta in HFSource(trainer).metadata()}
    return trainer


@torch.no_grad()
def move(parameter):
    parameter += 0.5 * torch.randn_like(parameter)


@pytest.mark.parametrize("policy", ["reorder", "spill"])
def test_a_head_that_the_trainer_has_untied_is_refused(subject, policy):
    one = subject("tied")
    trainer = with_own_head(one)
    move(trainer.lm_head.weight)
    assert logprob_gap(one.engine, trainer) > 0.1
    with (
        session(one, HFSource(trainer), policy=policy, on_failure="rollback") as sync,
        pytest.raises(CoverageError, match="one parameter in the engine") as refused,
    ):
        sync.push()
    assert refused.value.tensor == HEAD
    assert one.generates_as(OLD)


def test_a_head_that_only_has_another_name_is_exact(subject):
    one = subject("tied")
    assert one.wrong_weights(NEW)
    with session(one, HFSource(with_own_head(one)), verify="checksum") as sync:
        sync.push()
    assert one.wrong_weights(NEW) == []


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_one_that_moves_alone_is_seen_in_a_sync_of_a_part(subject, name):
    one = subject("tied")
    trainer = with_own_head(one)
    with session(one, HFSource(trainer), delta="layers", on_failure="rollback") as sync:
        sync.push(step=1)
        assert sync.push(step=2).unsent_tensors > 0
        move(trainer.get_submodule(name).weight)
        with pytest.raises(CoverageError) as refused:
            sync.push(step=3)
        assert refused.value.tensor == HEAD
        assert one.generates_as(NEW)
    push(one, OLD)
