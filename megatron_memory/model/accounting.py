"""Parameters, FLOPs and bytes of a model, by arithmetic: nothing is allocated.

Axes: H heads of the memory, K values read per head, N half-keys, S slots, D value dimension.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from megatron_memory.config import Config
from megatron_memory.config.placement import resolve_memory_layers

Part = Literal["dense", "router", "values", "experts"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """Parameters of one kind in the model."""

    part: Part
    """dense: all but the following; router: the memory's queries and keys; values: its tables;
    experts: of a mixture-of-experts baseline."""
    size: int
    """Elements over all ranks."""
    is_split: bool
    """Whether the tensor-parallel ranks share it (else each holds all of it)."""


def memory_layers(config: Config) -> tuple[int, ...]:
    """The memory layers, counted from 0."""
    if config.memory.layers is None:
        return ()
    return resolve_memory_layers(config.memory.layers, config.model.num_layers)


def expert_layers(config: Config) -> tuple[int, ...]:
    """The layers with experts, counted from 0."""
    if config.model.num_experts is None:
        return ()
    return tuple(range(0, config.model.num_layers, config.model.moe_layer_freq))


def weights(config: Config, padded_vocab_size: int) -> list[Weight]:
    """Every parameter of the model."""
    model = config.model
    with_memory, with_experts = memory_layers(config), expert_layers(config)
    found = list(_ends(config, padded_vocab_size))
    for layer in range(model.num_layers):
        found += _attention(config)
        if layer in with_memory:
            found += _memory_layer(config)
        elif layer in with_experts:
            found += _experts(config)
        else:
            found += _mlp(config, model.ffn_hidden_size, "dense")
    found += _tables(config)
    return found


def _norm(config: Config, width: int) -> Weight:
    tensors = 2 if config.model.normalization == "LayerNorm" else 1
    return Weight(part="dense", size=tensors * width, is_split=False)


def _ends(config: Config, padded_vocab_size: int) -> Iterator[Weight]:
    """Embeddings, final norm, output layer."""
    model = config.model
    embedding = Weight(part="dense", size=padded_vocab_size * model.hidden_size, is_split=True)
    yield embedding
    if model.untie_embeddings_and_output_weights:
        yield embedding
    if model.position_embedding_type == "learned_absolute":
        size = model.max_position_embeddings * model.hidden_size
        yield Weight(part="dense", size=size, is_split=False)
    yield _norm(config, model.hidden_size)


def _attention(config: Config) -> Iterator[Weight]:
    model = config.model
    width = model.num_attention_heads * model.kv_channels
    qkv = width + 2 * model.num_query_groups * model.kv_channels
    has_bias = not model.disable_bias_linear
    yield _norm(config, model.hidden_size)
    yield Weight(part="dense", size=model.hidden_size * (qkv + width), is_split=True)
    if has_bias or model.add_qkv_bias:
        yield Weight(part="dense", size=qkv, is_split=True)
    if has_bias:
        yield Weight(part="dense", size=model.hidden_size, is_split=False)
    if model.qk_layernorm:
        yield _norm(config, model.kv_channels)
        yield _norm(config, model.kv_channels)
    # Before the MLP, or whatever stands in its place.
    yield _norm(config, model.hidden_size)


def _mlp(config: Config, inner: int, part: Part, copies: int = 1) -> Iterator[Weight]:
    model = config.model
    first = 2 * inner if model.swiglu else inner
    yield Weight(part=part, size=copies * model.hidden_size * (first + inner), is_split=True)
    if not model.disable_bias_linear:
        yield Weight(part=part, size=copies * first, is_split=True)
        yield Weight(part=part, size=copies * model.hidden_size, is_split=False)


def _experts(config: Config) -> Iterator[Weight]:
    model = config.model
    assert model.num_experts is not None, "the layer has experts"
    yield Weight(part="dense", size=model.num_experts * model.hidden_size, is_split=False)
    yield from _mlp(config, model.moe_ffn_hidden_size, "experts", copies=model.num_experts)


def projects_output(config: Config) -> bool:
    """Whether the memory layer's output is projected."""
    memory = config.memory
    return memory.variant == "memory+" or (
        memory.variant == "pkm" and memory.value_dim != config.model.hidden_size
    )


def _memory_layer(config: Config) -> Iterator[Weight]:
    hidden, memory = config.model.hidden_size, config.memory
    queries = memory.num_heads * memory.key_dim
    router = (hidden + 1) * queries + memory.num_heads * memory.num_half_keys * memory.key_dim
    router += 2 * memory.key_dim if memory.qk_norm else 0
    router += memory.num_heads if memory.softmax_sink else 0
    yield Weight(part="router", size=router, is_split=False)
    if memory.variant == "memory+":
        yield Weight(part="dense", size=(hidden + 1) * memory.value_dim, is_split=True)
    if projects_output(config):
        yield Weight(part="dense", size=memory.value_dim * hidden, is_split=True)
        yield Weight(part="dense", size=hidden, is_split=False)
    if memory.gated:
        yield Weight(part="dense", size=hidden + 1, is_split=False)


def _tables(config: Config) -> Iterator[Weight]:
    memory, tables = config.memory, _num_tables(config)
    if tables:
        yield Weight(
            part="values", size=tables * memory.num_values * memory.value_dim, is_split=True
        )


def _num_tables(config: Config) -> int:
    num_layers = len(memory_layers(config))
    owners = min(num_layers, 1) if config.memory.share_scope == "model" else num_layers
    return owners * (2 if config.memory.variant == "peer" else 1)


def count(config: Config, found: list[Weight], *, on_one_rank: bool) -> dict[Part, int]:
    """Parameters by part, of the whole model or of one rank."""
    totals: dict[Part, int] = {"dense": 0, "router": 0, "values": 0, "experts": 0}
    for weight in found:
        size = weight.size
        if on_one_rank and weight.is_split:
            size //= config.parallel.tensor_model_parallel_size
        if on_one_rank and weight.part == "values":
            size //= config.memory.parallel_size
        if on_one_rank and weight.part == "experts":
            size //= config.parallel.expert_model_parallel_size
        totals[weight.part] += size
    return totals


def flops_per_token(config: Config, padded_vocab_size: int) -> dict[str, int]:
    """FLOPs of one training token, forward and backward, by what computes them.

    A multiply-add is two; the backward pass is twice the forward one; what recompute repeats is not
    counted. Attention is causal: a token sees half of the sequence on average. Values are
    not FLOPs: only the rows that a token reads are, under `weighted sum of values`. Norms, softmax
    and selection are left out, as usual.
    """
    model, num_memory, num_expert = (
        config.model,
        len(memory_layers(config)),
        len(expert_layers(config)),
    )
    width = model.num_attention_heads * model.kv_channels
    qkv = width + 2 * model.num_query_groups * model.kv_channels
    matrices = 3 if model.swiglu else 2
    num_mlps = model.num_layers - num_memory - num_expert
    products = {
        "attention projections": model.num_layers * model.hidden_size * (qkv + width),
        "attention scores and sums": model.num_layers * width * model.seq_length,
        "MLP": num_mlps * matrices * model.hidden_size * model.ffn_hidden_size,
        "output layer": model.hidden_size * padded_vocab_size,
    }
    if num_expert:
        expert = matrices * model.hidden_size * model.moe_ffn_hidden_size
        router = model.hidden_size * (model.num_experts or 0)
        products["experts"] = num_expert * (router + model.moe_router_topk * expert)
    products |= {name: num_memory * n for name, n in _memory_products(config).items() if num_memory}
    return {name: 3 * 2 * number for name, number in products.items() if number}


def _memory_products(config: Config) -> dict[str, int]:
    """Multiply-adds of one memory layer for one token, forward."""
    hidden, memory = config.model.hidden_size, config.memory
    queries = memory.num_heads * memory.key_dim
    rows = memory.num_heads * (memory.top_k + memory.num_random_values)
    projections = int(memory.variant == "memory+") + int(projects_output(config))
    return {
        "memory query projection": hidden * queries,
        "memory key scores": queries * memory.num_half_keys,
        "memory gate and output": projections * hidden * memory.value_dim
        + (hidden if memory.gated else 0),
        "weighted sum of values": rows * memory.value_dim * (2 if memory.variant == "peer" else 1),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    main_weights: int
    """fp32 copies that bf16 weights are updated through."""
    optimizer_states: int

    @property
    def total(self) -> int:
        """Of all four."""
        return self.weights + self.gradients + self.main_weights + self.optimizer_states


def rank_memory(config: Config, num_parameters: int, data_parallel_size: int) -> RankMemory:
    """Bytes that `num_parameters` of one rank take, states included.

    With the distributed optimizer the data-parallel ranks share main weights and states.
    """
    bf16 = config.precision.bf16
    reduced = bf16 and not config.precision.accumulate_allreduce_grads_in_fp32
    shards = data_parallel_size if config.parallel.use_distributed_optimizer else 1
    kept = math.ceil(num_parameters / shards)
    tensors = 2 if config.optimizer.optimizer == "adam" else int(config.optimizer.sgd_momentum > 0)
    return RankMemory(
        weights=num_parameters * (2 if bf16 else 4),
        gradients=num_parameters * (2 if reduced else 4),
        main_weights=4 * kept if bf16 else 0,
        optimizer_states=4 * tensors * kept,
    )


def fp8_shadow_bytes(config: Config) -> int:
    """Bytes on one rank of the values in fp8, which layers read with `--memory-fp8-values`."""
    memory, tables = config.memory, _num_tables(config)
    if not memory.fp8_values:
        return 0
    ranks = config.parallel.tensor_model_parallel_size * memory.parallel_size
    columns = memory.value_dim // ranks
    return tables * memory.num_values * (columns + 4)


def activation_bytes(config: Config, padded_vocab_size: int) -> int:
    """A rough estimate of the activations that one microbatch keeps for its backward pass.

    After "Reducing Activation Recomputation in Large Transformer Models" (arXiv 2205.05198),
    section 4; a memory layer counts as an MLP and its routes.
    """
    model, ranks = config.model, config.parallel.tensor_model_parallel_size
    tokens = model.seq_length * config.training.micro_batch_size
    element = 2 if config.precision.bf16 else 4
    hidden_bytes = tokens * model.hidden_size * element
    logits = 2 * 4 * tokens * padded_vocab_size // ranks
    if config.recompute.recompute_granularity == "full":
        return model.num_layers * hidden_bytes + logits
    replicated = hidden_bytes * 5 // (ranks if config.parallel.sequence_parallel else 1)
    layer = replicated + hidden_bytes * 12 // ranks
    uses_flash = model.transformer_impl == "transformer_engine"
    if config.recompute.recompute_granularity != "selective" and not uses_flash:
        scores = tokens * model.seq_length * model.num_attention_heads
        layer += scores * (2 * element + 1) // ranks
    rows = config.memory.num_heads * (config.memory.top_k + config.memory.num_random_values)
    # Half-key scores, then index and weight of each row read, by the neighbours' tokens too.
    scores = 2 * config.memory.num_heads * config.memory.num_half_keys * 4
    shared = (config.memory.parallel_size - 1) * rows * 8
    routes = len(memory_layers(config)) * tokens * (scores + rows * 12 + shared)
    return model.num_layers * layer + routes + logits
