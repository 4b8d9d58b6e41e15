"""The shapes that a Llama-like model's tensors must have: a reshape alone would accept others."""

from collections.abc import Iterator

from megatron_memory.config import Config
from megatron_memory.config.pools import memory_layers, memory_pools
from megatron_memory.conversion.decoder import memory_prefix
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.exceptions import CheckpointError

Shape = tuple[int, ...]


def check_shapes(config: Config, vocab_size: int, tensors: Tensors, where: object) -> None:
    """Hold tensors by our names to the configuration.

    Raises:
        CheckpointError: names those of another shape.
    """
    expected = weight_shapes(config, vocab_size)
    wrong = [
        f"{name} is {list(tensor.shape)}, not {list(expected[name])}"
        for name, tensor in tensors.items()
        if tensor.shape != expected[name]
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"{where}: tensors do not have the shapes that its configuration says: "
            f"{'; '.join(wrong[:8])}{more}"
        )


def weight_shapes(config: Config, vocab_size: int) -> dict[str, Shape]:
    """Shapes by our names, vocabulary unpadded; biases as the names that a rule asks for."""
    return dict(_shapes(config, vocab_size))


def _shapes(config: Config, vocab_size: int) -> Iterator[tuple[str, Shape]]:
    model, hidden = config.model, config.model.hidden_size
    yield "embedding.word_embeddings.weight", (vocab_size, hidden)
    yield "output_layer.weight", (vocab_size, hidden)
    yield "decoder.final_layernorm.weight", (hidden,)
    with_memory = memory_layers(config)
    for layer in range(model.num_layers):
        prefix = f"decoder.layers.{layer}."
        yield from _attention(config, f"{prefix}self_attention.")
        yield f"{prefix}pre_mlp_layernorm.weight", (hidden,)
        yield from _mlp(config, f"{prefix}mlp.")
        if layer in with_memory:
            yield from _memory(config, memory_prefix(config, layer))
    rows = config.memory.num_values
    for pool in memory_pools(config):
        for table in ("values", "values_u", "values_v"):
            yield f"memory.{pool.name}.{table}.weight", (rows, config.memory.value_dim)


def _attention(config: Config, prefix: str) -> Iterator[tuple[str, Shape]]:
    model = config.model
    queries = model.num_attention_heads * model.kv_channels
    rows = queries + 2 * model.num_query_groups * model.kv_channels
    yield f"{prefix}linear_qkv.layer_norm_weight", (model.hidden_size,)
    yield from _linear(f"{prefix}linear_qkv.", rows, model.hidden_size)
    yield from _linear(f"{prefix}linear_proj.", model.hidden_size, queries)
    for norm in ("q_layernorm", "k_layernorm"):
        yield f"{prefix}{norm}.weight", (model.kv_channels,)


def _mlp(config: Config, prefix: str) -> Iterator[tuple[str, Shape]]:
    width, hidden = config.model.ffn_hidden_size, config.model.hidden_size
    yield f"{prefix}linear_fc1.layer_norm_weight", (hidden,)
    yield from _linear(f"{prefix}linear_fc1.", 2 * width, hidden)
    yield from _linear(f"{prefix}linear_fc2.", hidden, width)


def _memory(config: Config, prefix: str) -> Iterator[tuple[str, Shape]]:
    memory, hidden = config.memory, config.model.hidden_size
    heads = memory.num_heads
    yield f"{prefix}router.keys", (heads, 2, memory.num_half_keys, memory.key_dim // 2)
    yield from _linear(f"{prefix}router.query.", heads * memory.key_dim, hidden)
    for norm in ("query_norm", "key_norm"):
        yield f"{prefix}router.{norm}", (memory.key_dim,)
    yield f"{prefix}router.sink", (heads,)
    yield from _linear(f"{prefix}linear_fc1.", memory.value_dim, hidden)
    yield from _linear(f"{prefix}linear_fc2.", hidden, memory.value_dim)
    yield from _linear(f"{prefix}gate.", 1, hidden)


def _linear(prefix: str, rows: int, columns: int) -> Iterator[tuple[str, Shape]]:
    yield f"{prefix}weight", (rows, columns)
    yield f"{prefix}bias", (rows,)
