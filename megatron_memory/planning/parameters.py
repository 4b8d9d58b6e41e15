"""Every parameter of a model, by arithmetic: nothing is allocated.

Axes: H heads of the memory, K values read per head, N half-keys, S slots, D value dimension.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Literal

from megatron_memory.config import Config
from megatron_memory.config.pools import Pool, memory_layers, memory_pools, mlp_layers

Part = Literal["dense", "router", "values", "experts"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter tensor of the model."""

    part: Part
    """dense: all but the following; router: the memory's queries and keys; values: its tables;
    experts: of a mixture-of-experts baseline."""
    size: int
    """Elements over all ranks."""
    is_split: bool = False
    """Whether the tensor-parallel ranks share it (else each holds all of it)."""
    summed: Literal["never", "sequence", "always"] = "never"
    """When a replicated weight's gradient is summed over the tensor-parallel ranks: under sequence
    parallelism, or always, where each rank sees its own heads alone."""
    copies: tuple[int, ...] = ()
    """The pipeline ranks with a copy each, whose gradients are summed; empty where there is one."""


def expert_layers(config: Config) -> tuple[int, ...]:
    """The layers with experts, counted from 0."""
    if config.model.num_experts is None:
        return ()
    return tuple(range(0, config.model.num_layers, config.model.moe_layer_freq))


def weights(config: Config, padded_vocab_size: int) -> list[Weight]:
    """Every parameter of the model."""
    return [
        *embedding_weights(config, padded_vocab_size),
        *layer_weights(config, range(config.model.num_layers)),
        *output_weights(config, padded_vocab_size),
        *table_weights(config, memory_pools(config)),
    ]


def embedding_weights(
    config: Config, padded_vocab_size: int, copies: tuple[int, ...] = ()
) -> Iterator[Weight]:
    """Of the model's first end; `copies` as in `Weight`, of the matrix that the output shares."""
    model = config.model
    yield _vocabulary(config, padded_vocab_size, copies)
    if model.position_embedding_type == "learned_absolute":
        yield Weight(part="dense", size=model.max_position_embeddings * model.hidden_size)


def output_weights(
    config: Config, padded_vocab_size: int, copies: tuple[int, ...] = ()
) -> Iterator[Weight]:
    """Of the model's last end: final norm and output layer, which is the embedding's matrix where
    they are tied; with `copies`, a copy of it."""
    yield from _norm(config, config.model.hidden_size)
    if config.model.untie_embeddings_and_output_weights or copies:
        yield _vocabulary(config, padded_vocab_size, copies)


def _vocabulary(config: Config, padded_vocab_size: int, copies: tuple[int, ...]) -> Weight:
    size = padded_vocab_size * config.model.hidden_size
    return Weight(part="dense", size=size, is_split=True, copies=copies)


def layer_weights(config: Config, layers: Iterable[int]) -> list[Weight]:
    """Of some layers, counted from 0; the tables are not a layer's."""
    found: list[Weight] = []
    with_memory, with_experts = memory_layers(config), expert_layers(config)
    with_mlp = mlp_layers(config)
    for layer in layers:
        of_layer = list(_attention(config))
        if layer in with_experts:
            of_layer += _experts(config)
        elif layer in with_mlp:
            of_layer += _mlp(config, config.model.ffn_hidden_size, "dense")
        if layer in with_memory:
            of_layer += _memory_layer(config)
        found += of_layer
    return found


def _norm(config: Config, width: int, *, of_heads: bool = False) -> list[Weight]:
    tensors = 2 if config.model.normalization == "LayerNorm" else 1
    summed: Literal["always", "sequence"] = "always" if of_heads else "sequence"
    return [Weight(part="dense", size=width, summed=summed)] * tensors


def _attention(config: Config) -> Iterator[Weight]:
    """And the norms of the layer."""
    model = config.model
    width = model.num_attention_heads * model.kv_channels
    qkv = width + 2 * model.num_query_groups * model.kv_channels
    has_bias = not model.disable_bias_linear
    yield from _norm(config, model.hidden_size)
    yield Weight(part="dense", size=model.hidden_size * width, is_split=True)
    if has_bias:
        yield Weight(part="dense", size=model.hidden_size, summed="sequence")
    yield Weight(part="dense", size=model.hidden_size * qkv, is_split=True)
    if has_bias or model.add_qkv_bias:
        yield Weight(part="dense", size=qkv, is_split=True)
    if model.qk_layernorm:
        yield from _norm(config, model.kv_channels, of_heads=True)
        yield from _norm(config, model.kv_channels, of_heads=True)
    # Before the MLP and the memory.
    yield from _norm(config, model.hidden_size)


def _mlp(config: Config, inner: int, part: Part) -> Iterator[Weight]:
    model = config.model
    first = 2 * inner if model.swiglu else inner
    yield Weight(part=part, size=model.hidden_size * first, is_split=True)
    if not model.disable_bias_linear:
        yield Weight(part=part, size=first, is_split=True)
    yield Weight(part=part, size=model.hidden_size * inner, is_split=True)
    if not model.disable_bias_linear:
        yield Weight(
            part=part, size=model.hidden_size, summed="sequence" if part == "dense" else "never"
        )


def _experts(config: Config) -> Iterator[Weight]:
    model = config.model
    assert model.num_experts is not None, "the layer has experts"
    size = model.num_experts * model.hidden_size
    yield Weight(part="dense", size=size, summed="sequence")
    for _ in range(model.num_experts):
        yield from _mlp(config, model.moe_ffn_hidden_size, "experts")


def projects_output(config: Config) -> bool:
    """Whether the memory layer's output is projected."""
    memory = config.memory
    return memory.variant == "memory+" or (
        memory.variant == "pkm" and memory.value_dim != config.model.hidden_size
    )


def _memory_layer(config: Config) -> Iterator[Weight]:
    hidden, memory = config.model.hidden_size, config.memory
    queries = memory.num_heads * memory.key_dim
    router = [hidden * queries, queries, memory.num_half_keys * queries]
    router += [memory.key_dim] * 2 * memory.qk_norm + [memory.num_heads] * memory.softmax_sink
    for size in router:
        yield Weight(part="router", size=size, summed="sequence")
    if memory.variant == "memory+":
        yield Weight(part="dense", size=hidden * memory.value_dim, is_split=True)
        yield Weight(part="dense", size=memory.value_dim, is_split=True)
    if projects_output(config):
        yield Weight(part="dense", size=memory.value_dim * hidden, is_split=True)
        yield Weight(part="dense", size=hidden, summed="sequence")
    if memory.gated:
        yield Weight(part="dense", size=hidden, summed="sequence")
        yield Weight(part="dense", size=1, summed="sequence")


def table_weights(
    config: Config, pools: Iterable[Pool], copies: Iterable[tuple[int, ...]] | None = None
) -> list[Weight]:
    """Of the pools' tables; PEER's have two each. `copies` as in `Weight`, for each pool."""
    memory, pools = config.memory, list(pools)
    size = memory.num_values * memory.value_dim
    found = []
    for ranks in [()] * len(pools) if copies is None else copies:
        table = Weight(part="values", size=size, is_split=True, copies=ranks)
        found += [table] * (2 if memory.variant == "peer" else 1)
    return found


def size_on_rank(config: Config, weight: Weight) -> int:
    """Elements of a tensor on each rank that holds some of it."""
    size, parallel = weight.size, config.parallel
    if weight.is_split:
        size //= parallel.tensor_model_parallel_size
    return size // config.memory.parallel_size if weight.part == "values" else size


def on_rank(config: Config, found: Iterable[Weight]) -> list[Weight]:
    """The tensors that one of the ranks with these weights holds: of the experts its share."""
    kept: list[Weight] = []
    experts: list[Weight] = []
    for weight in found:
        (experts if weight.part == "experts" else kept).append(weight)
    share = len(experts) // config.parallel.expert_model_parallel_size
    return kept + experts[:share]


def count(config: Config, found: Iterable[Weight], *, on_one_rank: bool) -> dict[Part, int]:
    """Parameters by part, of the whole model or of one rank."""
    totals: dict[Part, int] = {"dense": 0, "router": 0, "values": 0, "experts": 0}
    for weight in on_rank(config, found) if on_one_rank else found:
        totals[weight.part] += size_on_rank(config, weight) if on_one_rank else weight.size
    return totals
