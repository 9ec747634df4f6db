"""A model in this process, and what may become of it between two syncs."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from support.models import make_model

from qerl_sync.errors import ConfigError, CoverageError
from qerl_sync.sources.hf import HFSource
from qerl_sync.sources.sharded import ShardedSource
from qerl_sync.verify.changes import sample_hash
from qerl_sync.verify.parts import part_here


@pytest.fixture
def group(tmp_path):
    started = not dist.is_initialized()  # vLLM engines of earlier tests keep one
    if started:
        store = f"file://{tmp_path / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    if started:
        dist.destroy_process_group()


def fully_shard(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def wrap(model, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    alone = dist.new_group([0])
    return FullyShardedDataParallel(model, alone, device_id=torch.device("cpu"), **options)


def wrap_with_names(model):
    return wrap(model, use_orig_params=True)


def wrap_layers(model):
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = wrap_with_names(layer)
    return model


def partition(model):
    for parameter in model.parameters():  # as DeepSpeed marks what it has partitioned
        parameter.ds_id = 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("shard", "sharding"),
    [
        (fully_shard, "fully_shard"),
        (wrap, "FullyShardedDataParallel"),
        (wrap_with_names, "FullyShardedDataParallel"),
        (wrap_layers, "FullyShardedDataParallel"),
        (partition, "ZeRO-3"),
    ],
)
def test_a_model_that_is_sharded_later_is_refused_by_name(shard, sharding, group):
    """As accelerate and transformers do in `train()`, when the source was made long ago."""
    model = make_model("tied", 0)
    source = HFSource(model)
    whole = source.metadata()
    wrapped = shard(model)
    with pytest.raises(ConfigError) as raised:
        source.metadata()
    assert sharding in raised.value.sharding
    assert raised.value.parameter in dict(model.named_parameters())
    # The source that is advised takes the model, if FSDP1 has left its own parameters.
    if shard is fully_shard:
        assert ShardedSource(model).metadata() == whole
    elif shard is wrap_with_names:
        assert ShardedSource(wrapped).metadata() == whole
        assert ShardedSource(model, root=lambda: wrapped).metadata() == whole
        with pytest.raises(ConfigError):
            ShardedSource(model)
    elif shard is wrap_layers:
        found, fresh = ShardedSource(model), HFSource(make_model("tied", 0))
        assert found.metadata() == fresh.metadata() == whole
        names = [meta.name for meta in whole]
        weights = dict(fresh.materialize(names))
        assert all(torch.equal(t, weights[name]) for name, t in found.materialize(names))
    elif shard is wrap:
        with pytest.raises(ConfigError) as raised:
            ShardedSource(wrapped)
        assert raised.value.sharding == "FullyShardedDataParallel"
        assert "use_orig_params" in str(raised.value)


def test_adapters_that_are_added_later_are_refused():
    from peft import LoraConfig

    model = make_model("tied", 0)
    source = HFSource(model)
    assert source.metadata()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError):
        source.metadata()


def test_a_partition_ends_where_its_parameter_does(group):
    """DeepSpeed pads the last rank's with memory that nobody has written."""
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.tensor([1.0, 2.0, 3.0, float("nan")])
    parameter.ds_process_group = dist.group.WORLD
    parameter.ds_numel = 3
    assert part_here(parameter).tolist() == [1.0, 2.0, 3.0]
    before = sample_hash(parameter)
    parameter.ds_tensor[3] = 4.0
    assert sample_hash(parameter) == before, "what nobody trains was taken for a change"
    parameter.ds_numel = 4
    assert part_here(parameter).numel() == 4


def test_a_weight_that_is_written_to_while_it_is_sent_is_named():
    """By an optimizer, or where `.data` is replaced, which torch does not count."""
    model = make_model("dense", 0)
    name, parameter = next(iter(model.named_parameters()))
    source = HFSource(model)
    writes = (
        lambda: torch.optim.AdamW([parameter], fused=True).step(),
        lambda: setattr(parameter, "data", parameter.data.clone()),
    )
    for write in writes:
        names = [meta.name for meta in source.metadata()]
        parameter.grad = torch.ones_like(parameter)
        assert len(list(source.materialize(names))) == len(names)
        source.require_unwritten()
        write()
        with pytest.raises(CoverageError) as refused:
            source.require_unwritten()
        assert refused.value.tensor == name
