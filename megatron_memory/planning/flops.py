"""FLOPs of a training token, by what computes them."""

from megatron_memory.config import Config
from megatron_memory.config.pools import memory_layers
from megatron_memory.planning.parameters import expert_layers, projects_output


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
