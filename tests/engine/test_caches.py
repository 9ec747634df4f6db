"""What an engine has computed with old weights, and keeps, does not outlive a sync."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.engines import start_engine
from support.vision import gap, make_vision_model, picture, save_vision_model

from qerl_sync import SyncConfig
from qerl_sync.build import make_session
from qerl_sync.errors import PoisonedError, StaleCacheError
from qerl_sync.integrations.ray.actors import RolloutActor
from qerl_sync.sources.hf import HFSource
from qerl_sync.worker.compat.caches import connector_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SAME = 1e-5
# Two of vLLM's blocks, which the connector stores, and a bit.
LONG = [3 + 7 * i % 250 for i in range(300)]


@pytest.fixture(scope="module")
def caching(engine_pool, tmp_path_factory):
    """A vision-language model behind a KV connector; an engine with all caches that there are."""
    from support import connectors

    engine_pool.subject("moe", "stock")  # must be the first of its process
    connectors.register()
    folder = tmp_path_factory.mktemp("caching")
    (folder / "kv").mkdir()
    model = make_vision_model(0)
    llm = start_engine(
        save_vision_model(model, folder / "model"),
        skip_tokenizer_init=False,
        limit_mm_per_prompt={"image": 1},
        max_model_len=512,
        kv_transfer_config={
            "kv_connector": "ResettableConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")},
        },
    )
    engine_pool.keep(llm)
    connector = connectors.ResettableConnector
    yield SimpleNamespace(llm=llm, model=model, connector=connector, session=session_of(llm, model))
    # vLLM has one connector a process, which every other engine in it would ask as well.
    from vllm.distributed.kv_transfer.kv_transfer_state import ensure_kv_transfer_shutdown

    ensure_kv_transfer_shutdown()


def session_of(llm, model):
    return make_session(HFSource(model), SyncConfig(), llm=llm)


def test_an_actor_generates_from_images_too(caching):
    class Hosting(RolloutActor):
        def _start(self, engine):
            return caching.llm

    caching.session.push()
    actor = Hosting({}, serve_initial_weights=True)
    tokens = {"prompt_token_ids": [8, 9]}
    reported = [
        actor.generate(
            [{**tokens, "multi_modal_data": {"image": picture(seed)}}], {"temperature": 0}
        )
        for seed in (1, 2)
    ]
    assert reported[0][0].logprobs != reported[1][0].logprobs


@torch.no_grad()
def change(module):
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def test_an_image_is_looked_at_again_by_a_new_vision_tower(caching):
    llm, model, image = caching.llm, caching.model, picture()
    caching.session.push()
    assert gap(llm, model, [8, 9], image) <= SAME
    change(model.vision_model)
    assert gap(llm, model, [8, 9], image) > 1e-2, "or the image matters to nothing"
    caching.session.push()
    assert gap(llm, model, [8, 9], image) <= SAME


def test_what_a_connector_keeps_of_old_weights_is_not_used(caching):
    llm, model = caching.llm, caching.model
    caching.session.push()
    assert gap(llm, model, LONG) <= SAME
    assert llm.reset_prefix_cache()
    assert gap(llm, model, LONG) <= SAME, "out of the connector"
    change(model.language_model)
    caching.session.push()
    assert gap(llm, model, LONG) <= SAME


def test_an_engine_whose_connector_does_not_empty_its_cache_does_not_generate(caching, monkeypatch):
    caching.session.push()
    change(caching.model.language_model)
    with monkeypatch.context() as patch:
        patch.setattr(caching.connector, "answers", False)
        with pytest.raises(StaleCacheError) as raised:
            caching.session.push()
        assert raised.value.connector == "ResettableConnector"
        with pytest.raises(PoisonedError):
            gap(caching.llm, caching.model, LONG)
    caching.session.push()
    assert gap(caching.llm, caching.model, LONG) <= SAME


def test_a_connector_that_cannot_be_emptied_is_refused_before_the_first_sync(caching, monkeypatch):
    monkeypatch.delattr(caching.connector, "reset_cache")
    with pytest.raises(StaleCacheError) as raised:
        session_of(caching.llm, caching.model)
    assert raised.value.connector == "ResettableConnector"


def transfer(connector, **extra):
    from vllm.config import KVTransferConfig

    role = connector and "kv_both"
    return KVTransferConfig(kv_connector=connector, kv_role=role, kv_connector_extra_config=extra)


def several(*connectors):
    configs = [{"kv_connector": name, "kv_role": "kv_both"} for name in connectors]
    return transfer("MultiConnector", connectors=configs)


@pytest.mark.parametrize(
    ("config", "connector", "kept"),
    [
        ({}, "", False),
        ({"kv_transfer_config": transfer(None)}, "", False),
        ({"ec_transfer_config": SimpleNamespace(ec_connector=None)}, "", False),
        ({"kv_transfer_config": transfer("OffloadingConnector")}, "OffloadingConnector", False),
        ({"kv_transfer_config": transfer("ExampleConnector")}, "ExampleConnector", True),
        (
            {"kv_transfer_config": transfer("OffloadingConnector", secondary_tiers=[{}])},
            "OffloadingConnector",
            True,
        ),
        ({"kv_transfer_config": several("OffloadingConnector")}, "MultiConnector", False),
        (
            {"kv_transfer_config": several("OffloadingConnector", "ExampleConnector")},
            "MultiConnector",
            True,
        ),
        (
            {"ec_transfer_config": SimpleNamespace(ec_connector="ECExampleConnector")},
            "ECExampleConnector",
            True,
        ),
    ],
)
def test_which_connectors_can_be_emptied(config, connector, kept):
    """vLLM itself reports a reset of each of them as a success."""
    none = {"kv_transfer_config": None, "ec_transfer_config": None}
    name, keeps = connector_of(SimpleNamespace(**{**none, **config}))
    assert (name, bool(keeps)) == (connector, kept)
