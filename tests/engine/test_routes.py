"""Tensors that are loaded by the copies that vLLM's loaders were seen to make, without them."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch
from support.engines import NEW, OLD, logprob_gap
from support.models import CONFIGS
from support.syncs import session

from qerl_sync import HFSource
from qerl_sync.errors import LayerMapError
from qerl_sync.worker.compat import engine as compat
from qerl_sync.worker.load.observe import observe_layer_map
from qerl_sync.worker.load.routes import record_routes

pytestmark = pytest.mark.vllm

NORM = "model.layers.0.input_layernorm"
# Their loader fills the rows behind the vocabulary with zeros.
PADDED = {"model.embed_tokens.weight", "lm_head.weight"}


def routes_of(one):
    """The routes, and names of the tensors that land in parent layers."""
    parts, metas = compat.in_process_parts(one.engine), HFSource(one.trainers[OLD]).metadata()
    layer_map = observe_layer_map(parts.model, parts.vllm_config, metas)
    routes = record_routes(parts.model, parts.vllm_config, metas, layer_map)
    return routes, {name for name, landed in layer_map.contributions.items() if landed}


class Seen:
    """Counts the tensors that reach the model's own loaders."""

    def __init__(self, one, monkeypatch):
        self.names = set()
        load_weights = one.model.load_weights

        def watched(weights):
            def stream():
                for name, tensor in weights:
                    self.names.add(name)
                    yield name, tensor

            return load_weights(stream())

        monkeypatch.setitem(vars(one.model), "load_weights", watched)


@pytest.mark.parametrize("kernels", ["stock", "plain"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sync_needs_no_loader(subject, monkeypatch, kind, kernels):
    one = subject(kind, kernels)
    assert one.wrong_weights(NEW), "both versions are the same: the test could not fail"
    routes, landing = routes_of(one)
    assert routes.keys() == (landing - PADDED if kind == "padded" else landing)
    with session(one, HFSource(one.trainers[NEW]), policy="reorder", chunk_bytes="40KiB") as sync:
        sync._agree()
        seen = Seen(one, monkeypatch)
        report = sync.push()
    assert not seen.names & routes.keys()
    assert one.wrong_weights(NEW) == []
    assert one.generates_as(NEW)
    assert logprob_gap(one.engine, one.trainers[NEW]) <= 1e-5
    assert report.prediction_exact, report.first_difference


@contextmanager
def norm_loaded_by(one, loader):
    parameter = compat.recorded_parameters(one.model.get_submodule(NORM))["weight"]
    own = vars(parameter).get("weight_loader")
    parameter.weight_loader = loader
    try:
        yield
    finally:
        if own is None:
            del parameter.weight_loader
        else:
            parameter.weight_loader = own


def scaled(param, loaded_weight):
    param.data.copy_(loaded_weight * 1)


def joined(param, loaded_weight):
    param.data.copy_(torch.cat([loaded_weight[:1], loaded_weight[1:]]))


def filled_first(param, loaded_weight):
    param.data.fill_(0)
    param.data.copy_(loaded_weight)


@pytest.mark.parametrize("loader", [scaled, joined, filled_first])
def test_what_does_more_than_copying_is_left_to_its_loader(subject, loader):
    one = subject("dense")
    with norm_loaded_by(one, loader):
        routes, landing = routes_of(one)
        assert landing - routes.keys() == {f"{NORM}.weight"}
        session(one, HFSource(one.trainers[NEW])).push()
        assert one.wrong_weights(NEW) == []


def test_a_model_that_takes_no_empty_stream_has_no_routes(subject, monkeypatch):
    one = subject("dense")
    load_weights = one.model.load_weights

    def demanding(weights):
        weights = iter(weights)
        first = next(weights)  # which is not there
        return load_weights(itertools.chain([first], weights))

    monkeypatch.setitem(vars(one.model), "load_weights", demanding)
    assert routes_of(one)[0] == {}
    session(one, HFSource(one.trainers[NEW])).push()
    assert one.wrong_weights(NEW) == []


@pytest.mark.parametrize("load", ["auto", "layerwise"])
def test_a_model_that_computes_with_weights_while_it_loads_is_refused(subject, monkeypatch, load):
    """As vLLM's LongcatFlash does, which scales norms once, when it loads them first."""
    one = subject("dense")
    load_weights = one.model.load_weights
    norm = one.model.get_submodule(NORM)
    one.model.derived = before = norm.weight.clone()

    def deriving(weights):
        loaded = load_weights(weights)
        one.model.derived = norm.weight * 2
        return loaded

    monkeypatch.setitem(vars(one.model), "load_weights", deriving)
    try:
        with pytest.raises(LayerMapError, match=rf"{NORM}.weight"):
            session(one, HFSource(one.trainers[NEW]), load=load).push()
        assert one.model.derived is before
        assert one.generates_as(OLD)
    finally:
        del one.model.derived


def test_tensors_that_a_model_counts_have_no_routes(subject, monkeypatch):
    """With the fifth tensor, and no other way, this model refreshes what it derives."""
    one = subject("dense")
    load_weights = one.model.load_weights
    norm = one.model.get_submodule(NORM).weight

    def counting(weights):
        def stream():
            for at, (name, tensor) in enumerate(weights):
                yield name, tensor
                if at == 4:
                    norm.data.mul_(1)

        return load_weights(stream())

    monkeypatch.setitem(vars(one.model), "load_weights", counting)
    assert routes_of(one)[0] == {}


def test_tensors_that_a_model_joins_have_no_routes(subject, monkeypatch):
    """This model keeps a norm's weight, loads it, and uses it once more with the next layer's."""
    one = subject("dense")
    load_weights = one.model.load_weights
    names = {f"model.layers.{at}.input_layernorm.weight" for at in (0, 1)}

    def joining(weights):
        kept = []

        def stream():
            for name, tensor in weights:
                if name in names:
                    kept.append(tensor)
                    if len(kept) == 2:
                        tensor = torch.stack(kept)[1]
                yield name, tensor

        return load_weights(stream())

    monkeypatch.setitem(vars(one.model), "load_weights", joining)
    routes, landing = routes_of(one)
    assert landing - routes.keys() == names
    session(one, HFSource(one.trainers[NEW])).push()
    assert one.wrong_weights(NEW) == []


def plainly(param, loaded_weight):
    param.data.copy_(loaded_weight, non_blocking=True)


def test_a_loader_that_copies_without_waiting_has_a_route(subject):
    one = subject("dense")
    with norm_loaded_by(one, plainly):
        routes, landing = routes_of(one)
    assert routes.keys() == landing


def test_sessions_that_take_turns_keep_their_routes(subject, monkeypatch):
    one = subject("dense", "plain")
    first = session(one, HFSource(one.trainers[NEW]))
    first.push()
    session(one, HFSource(one.trainers[OLD]), load="layerwise").push()
    seen = Seen(one, monkeypatch)
    first.push()
    assert seen.names == set()
    assert one.wrong_weights(NEW) == []


def test_layerwise_is_what_vllm_does(subject, monkeypatch):
    one = subject("dense")
    with session(one, HFSource(one.trainers[NEW]), load="layerwise") as sync:
        sync._agree()
        seen = Seen(one, monkeypatch)
        sync.push()
    assert len(seen.names) == len(HFSource(one.trainers[NEW]).metadata())
    assert one.wrong_weights(NEW) == []


def test_a_route_is_where_the_loader_copies(subject):
    """The value head of a fused projection lies behind the query's and the key's rows."""
    routes, _ = routes_of(subject("dense"))
    (call,) = routes["model.layers.0.self_attn.v_proj.weight"]
    assert (call.path, call.parameter) == ("model.layers.0.self_attn.qkv_proj", "weight")
    assert call.copies == ((((64, 64), (64, 1), (128 + 64) * 64), None),)
    assert (call.held, call.loaded_numel) == (None, 64 * 64)
