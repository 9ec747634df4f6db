"""How vLLM's model classes stack the checkpoints of some architectures, as tables.

An architecture stands here only if the tests hold it against the map observed from vLLM's own
model class, name by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

from qerl_sync.errors import PlanError

VOCABULARY_MULTIPLE = 64


class Slot(NamedTuple):
    """A checkpoint tensor and the vLLM module that it goes to.

    Attributes:
        name, shape: of the checkpoint tensor.
        module, kind: the module's path and class.
        parameter: the module's parameter that takes it.
        room: elements that the module keeps for it; more than it has where a vocabulary is padded.
    """

    name: str
    shape: tuple[int, ...]
    module: str
    kind: str
    parameter: str
    room: int


class Sizes:
    """What the tables read from a `config.json`.

    Raises:
        PlanError: a field is missing whose default only transformers knows.
    """

    def __init__(self, config: Mapping[str, Any], *, head_dim_defaults: bool) -> None:
        self._config = config
        self.hidden = self.number("hidden_size")
        self.vocabulary = self.number("vocab_size")
        self.layers = self.number("num_hidden_layers")
        heads = self.number("num_attention_heads")
        given = config.get("head_dim") is not None or not head_dim_defaults
        self.head = self.number("head_dim") if given else self.hidden // heads
        self.query = heads * self.head
        self.key = self.number("num_key_value_heads") * self.head

    def number(self, *names: str) -> int:
        """A field, under the first of its names that is there."""
        value = next((self._config[name] for name in names if name in self._config), None)
        if not isinstance(value, int):
            raise PlanError(
                f"the rules need {names[0]!r} as a number in the config.json; it is {value!r}"
            )
        return value

    @property
    def experts(self) -> int:
        return self.number("num_experts", "num_local_experts")

    def flag(self, field: str, *, default: bool = False) -> bool:
        return bool(self._config.get(field, default))

    def require(self, field: str, value: bool, why: str) -> None:
        """Refuse a model for which vLLM's class has no place. It is for `value` by default."""
        if self.flag(field, default=value) is not value:
            raise PlanError(f"the config.json has {field} {self._config[field]!r}: {why}")

    def has_experts(self, index: int) -> bool:
        """transformers' rule for the Qwen MoE families."""
        dense: list[int] = self._config.get("mlp_only_layers") or []
        return index not in dense and (index + 1) % self.number("decoder_sparse_step") == 0


@dataclass(frozen=True)
class Architecture:
    """One of vLLM's model classes.

    Attributes:
        layer: the tensors of a decoder layer, with or without experts, in the order in which
            transformers 5 names them. Names and modules are relative to the layer.
        has_experts: has the layer of that index experts?
        norm: class of the last norm.
        tied: are head and embeddings one where the config does not say?
        head_dim_defaults: is a head, where the config does not say, hidden size by heads?
    """

    layer: Callable[[Sizes, bool], Iterator[Slot]]
    has_experts: Callable[[Sizes, int], bool] = lambda sizes, index: False
    norm: str = "RMSNorm"
    tied: bool = False
    head_dim_defaults: bool = True


class Block(NamedTuple):
    """Part of a model: names and modules of its slots stand under `prefix`.

    Alike decoder layers share one tuple of slots.
    """

    prefix: str
    slots: tuple[Slot, ...]


def blocks_of(config: Mapping[str, Any]) -> list[Block]:
    """All tensors of a model, in the order of transformers 5.

    Raises:
        PlanError: the tables do not know the architecture or something that the config asks for.
    """
    architecture = ARCHITECTURES.get(architecture_name(config))
    if architecture is None:
        raise PlanError(
            f"the rules do not know the architecture {architecture_name(config)!r}, only "
            f"{', '.join(sorted(ARCHITECTURES))}; install vLLM, whose own model class is then asked"
        )
    if config.get("quantization_config") is not None:
        raise PlanError("the rules do not know quantised checkpoints; install vLLM to ask it")
    sizes = Sizes(config, head_dim_defaults=architecture.head_dim_defaults)
    layer = cache(lambda sparse: tuple(architecture.layer(sizes, sparse)))
    last = [*_norm("model.norm", sizes.hidden, architecture.norm)]
    if not sizes.flag("tie_word_embeddings", default=architecture.tied):
        last.append(_vocabulary("lm_head", "ParallelLMHead", sizes))
    return [
        Block("", (_vocabulary("model.embed_tokens", "VocabParallelEmbedding", sizes),)),
        *(
            Block(f"model.layers.{index}.", layer(architecture.has_experts(sizes, index)))
            for index in range(sizes.layers)
        ),
        Block("", tuple(last)),
    ]


def architecture_name(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "(none named)"


def _vocabulary(module: str, kind: str, sizes: Sizes) -> Slot:
    padded = -(-sizes.vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    shape = (sizes.vocabulary, sizes.hidden)
    return Slot(f"{module}.weight", shape, module, kind, "weight", padded * sizes.hidden)


def _linear(
    name: str, rows: int, columns: int, module: str, kind: str, *, bias: bool = False
) -> Iterator[Slot]:
    yield Slot(f"{name}.weight", (rows, columns), module, kind, "weight", rows * columns)
    if bias:
        yield Slot(f"{name}.bias", (rows,), module, kind, "bias", rows)


def _norm(name: str, size: int, kind: str = "RMSNorm") -> Iterator[Slot]:
    yield Slot(f"{name}.weight", (size,), name, kind, "weight", size)


def _attention(sizes: Sizes, *, qkv_bias: bool = False, o_bias: bool = False) -> Iterator[Slot]:
    stacked = "self_attn.qkv_proj"
    for part, rows in (("q", sizes.query), ("k", sizes.key), ("v", sizes.key)):
        name = f"self_attn.{part}_proj"
        yield from _linear(name, rows, sizes.hidden, stacked, "QKVParallelLinear", bias=qkv_bias)
    name = "self_attn.o_proj"
    yield from _linear(name, sizes.hidden, sizes.query, name, "RowParallelLinear", bias=o_bias)


def _head_norms(sizes: Sizes, kind: str = "RMSNorm") -> Iterator[Slot]:
    yield from _norm("self_attn.q_norm", sizes.head, kind)
    yield from _norm("self_attn.k_norm", sizes.head, kind)


def _mlp(sizes: Sizes, width: int, *, at: str = "mlp", bias: bool = False) -> Iterator[Slot]:
    stacked = f"{at}.gate_up_proj"
    for part in ("gate_proj", "up_proj"):
        name = f"{at}.{part}"
        kind = "MergedColumnParallelLinear"
        yield from _linear(name, width, sizes.hidden, stacked, kind, bias=bias)
    name = f"{at}.down_proj"
    yield from _linear(name, sizes.hidden, width, name, "RowParallelLinear", bias=bias)


def _router(sizes: Sizes, at: str = "mlp") -> Iterator[Slot]:
    yield from _linear(f"{at}.gate", sizes.experts, sizes.hidden, f"{at}.gate", "GateLinear")


def _experts(
    sizes: Sizes,
    width: int,
    at: str = "mlp",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Slot]:
    """transformers 5 keeps one tensor for all gates, and names them before the next kind."""
    gate, up, down = names
    module = f"{at}.experts.routed_experts"
    for part, shape, parameter in (
        (gate, (width, sizes.hidden), "w13_weight"),
        (up, (width, sizes.hidden), "w13_weight"),
        (down, (sizes.hidden, width), "w2_weight"),
    ):
        for expert in range(sizes.experts):
            name = f"{at}.experts.{expert}.{part}.weight"
            yield Slot(name, shape, module, "RoutedExperts", parameter, prod(shape))


def _two_norms(sizes: Sizes) -> Iterator[Slot]:
    yield from _norm("input_layernorm", sizes.hidden)
    yield from _norm("post_attention_layernorm", sizes.hidden)


def _llama(sizes: Sizes, sparse: bool) -> Iterator[Slot]:
    bias = sizes.flag("attention_bias")
    yield from _attention(sizes, qkv_bias=bias, o_bias=bias)
    yield from _mlp(sizes, sizes.number("intermediate_size"), bias=sizes.flag("mlp_bias"))
    yield from _two_norms(sizes)


def _mistral(sizes: Sizes, sparse: bool) -> Iterator[Slot]:
    yield from _attention(sizes)
    yield from _mlp(sizes, sizes.number("intermediate_size"))
    yield from _two_norms(sizes)


def _mixtral(sizes: Sizes, sparse: bool) -> Iterator[Slot]:
    block, width = "block_sparse_moe", sizes.number("intermediate_size")
    yield from _attention(sizes)
    yield from _router(sizes, block)
    yield from _experts(sizes, width, block, names=("w1", "w3", "w2"))
    yield from _two_norms(sizes)


def _qwen2(sizes: Sizes, sparse: bool) -> Iterator[Slot]:
    yield from _attention(sizes, qkv_bias=True)
    yield from _mlp(sizes, sizes.number("intermediate_size"))
    yield from _two_norms(sizes)


def _qwen2_moe(sizes: Sizes, sparse: bool) -> Iterator[Slot]:
    sizes.require("qkv_bias", True, "vLLM's Qwen2-MoE has these biases always")
    yield from _attention(sizes, qkv_bias=True)
    if sparse:
        yield from _router(sizes)
        yield from _experts(sizes, sizes.number("moe_intermediate_size"))
        shared, gate = "mlp.shared_expert", "mlp.shared_expert_gate"
        yield from _mlp(sizes, sizes.number("shared_expert_intermediate_size"), at=shared)
        yield from _linear(gate, 1, sizes.hidden, gate, "ReplicatedLinear")
    else:
        yield from _mlp(sizes, sizes.number("intermediate_size"))
    yield from _two_norms(sizes)


def _qwen3(sizes: Sizes, sparse: bool) -> Iterator[Slot]:
    sizes.require("attention_bias", False, "vLLM's Qwen3 ignores the bias of o_proj")
    yield from _attention(sizes)
    yield from _head_norms(sizes)
    if sparse:
        yield from _experts(sizes, sizes.number("moe_intermediate_size"))
        yield from _router(sizes)
    else:
        yield from _mlp(sizes, sizes.number("intermediate_size"))
    yield from _two_norms(sizes)


def _gemma(sizes: Sizes, sparse: bool, *, head_norms: bool) -> Iterator[Slot]:
    bias = sizes.flag("attention_bias")
    yield from _attention(sizes, qkv_bias=bias, o_bias=bias)
    if head_norms:
        yield from _head_norms(sizes, "GemmaRMSNorm")
    yield from _mlp(sizes, sizes.number("intermediate_size"))
    for place in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        yield from _norm(f"{place}_layernorm", sizes.hidden, "GemmaRMSNorm")


def _every_layer(sizes: Sizes, index: int) -> bool:
    return True


_GEMMA: dict[str, Any] = {"norm": "GemmaRMSNorm", "tied": True, "head_dim_defaults": False}

ARCHITECTURES: dict[str, Architecture] = {
    "Gemma2ForCausalLM": Architecture(partial(_gemma, head_norms=False), **_GEMMA),
    "Gemma3ForCausalLM": Architecture(partial(_gemma, head_norms=True), **_GEMMA),
    "LlamaForCausalLM": Architecture(_llama),
    "MistralForCausalLM": Architecture(_mistral),
    "MixtralForCausalLM": Architecture(_mixtral, has_experts=_every_layer),
    "Qwen2ForCausalLM": Architecture(_qwen2),
    "Qwen2MoeForCausalLM": Architecture(_qwen2_moe, has_experts=Sizes.has_experts),
    "Qwen3ForCausalLM": Architecture(_qwen3, head_dim_defaults=False),
    "Qwen3MoeForCausalLM": Architecture(_qwen3, has_experts=Sizes.has_experts),
}
