"""FLOPs of a training token, by what computes them.

A multiply-add is two; the backward pass is twice the forward one. Attention is causal: a token sees
half of the sequence on average. Values are not FLOPs: only the rows that a token reads are, under
`weighted sum of values`. Norms, softmax and selection are left out, as usual.
"""

import collections
from collections.abc import Iterable

from megatron_memory.config import Config
from megatron_memory.config.pools import memory_layers, mlp_layers
from megatron_memory.planning.parameters import expert_layers, projects_output

ROUTING = ("memory query projection", "memory key scores")
"""What every tensor-parallel rank computes for all tokens without sequence parallelism."""


def flops_per_token(config: Config, padded_vocab_size: int) -> dict[str, int]:
    """Of one training token in the whole model, forward and backward; what recompute repeats is not
    counted."""
    products = forward_products(config, range(config.model.num_layers))
    products["output layer"] = output_products(config, padded_vocab_size)
    return {name: 3 * 2 * number for name, number in products.items() if number}


def output_products(config: Config, padded_vocab_size: int) -> int:
    """Multiply-adds of the output layer for one token, forward."""
    return config.model.hidden_size * padded_vocab_size


def forward_products(config: Config, layers: Iterable[int]) -> dict[str, int]:
    """Multiply-adds of some layers, counted from 0, for one token, forward."""
    model, with_memory, with_mlp = config.model, memory_layers(config), mlp_layers(config)
    with_experts = expert_layers(config)
    width = model.num_attention_heads * model.kv_channels
    qkv = width + 2 * model.num_query_groups * model.kv_channels
    matrices = 3 if model.swiglu else 2
    products: collections.Counter[str] = collections.Counter()
    for layer in layers:
        products["attention projections"] += model.hidden_size * (qkv + width)
        products["attention scores and sums"] += width * model.seq_length
        if layer in with_memory:
            products.update(_memory_products(config))
        if layer in with_experts:
            expert = matrices * model.hidden_size * model.moe_ffn_hidden_size
            router = model.hidden_size * (model.num_experts or 0)
            products["experts"] += router + model.moe_router_topk * expert
        elif layer in with_mlp:
            products["MLP"] += matrices * model.hidden_size * model.ffn_hidden_size
    return dict(products)


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
