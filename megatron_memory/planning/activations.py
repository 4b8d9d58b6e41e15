"""Bytes that a microbatch's forward pass keeps for its backward pass, layer by layer.

What Megatron-Core's modules and torch's operators save, tensor by tensor. Checked on the CPU
against real runs (tests/planning/test_memory.py) for local layers; what Transformer Engine and the
fused operators of GPUs save is from reading and not measured.

Axes: T tokens of a microbatch on a tensor-parallel group, H heads of the memory, K values read per
head, D value dimension.
"""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from megatron_memory.config import Config, RecomputeConfig
from megatron_memory.config.pools import memory_layers, mlp_layers
from megatron_memory.planning.parameters import expert_layers, projects_output
from megatron_memory.planning.states import element

Layers = Literal["local on CPU", "local", "transformer_engine"]
"""Who computes the layers. local: megatron-core's own, with its fused operators, on GPUs."""
LayerPart = Literal["stream", "attention", "mlp", "memory"]
"""stream: residuals, norms and dropout, and the model's ends."""
Kept = dict[LayerPart, int]
"""Bytes by part."""


def layers_of(config: Config) -> Layers:
    """Which layers the configuration means: without `--transformer-impl`, Transformer Engine's on
    GPUs."""
    if config.parallel.device == "cpu":
        return "local on CPU"
    return config.model.transformer_impl or "transformer_engine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the formulas share."""

    config: Config
    layers: Layers

    @property
    def element(self) -> int:
        """Bytes of an activation."""
        return element(self.config)

    @property
    def ranks(self) -> int:
        """Tensor-parallel."""
        return self.config.parallel.tensor_model_parallel_size

    @property
    def positions(self) -> int:
        """Of a sequence, on a context-parallel rank."""
        return self.config.model.seq_length // self.config.parallel.context_parallel_size

    @property
    def tokens(self) -> int:
        """T."""
        return self.positions * self.config.training.micro_batch_size

    @property
    def own_tokens(self) -> int:
        """Of them, those whose residual stream this rank has."""
        return self.tokens // (self.ranks if self.config.parallel.sequence_parallel else 1)

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return self.own_tokens * self.config.model.hidden_size * self.element

    def recomputes(self, module: str) -> bool:
        """Whether selective recompute covers a module."""
        recompute = self.config.recompute
        modules = recompute.recompute_modules or ("core_attn",)
        return recompute.recompute_granularity == "selective" and module in modules


def layer_activations(sizes: Sizes, layer: int) -> Kept:
    """What one layer, counted from 0, keeps where it is not recomputed as a whole."""
    kept: Kept = {
        "stream": _norm_and_input(sizes) + _dropout(sizes) + _norm_and_input(sizes),
        "attention": _attention(sizes),
    }
    kept["stream"] += _dropout(sizes)
    if layer in memory_layers(sizes.config):
        # With both modules the memories keep to their own.
        as_mlp = sizes.recomputes("mlp") and not sizes.recomputes("memory")
        kept["memory"] = 0 if as_mlp else _memory_layer(sizes)
    if layer in mlp_layers(sizes.config):
        kept["mlp"] = 0 if sizes.recomputes("mlp") else _mlp(sizes, layer)
    return kept


def chunk_activations(sizes: Sizes, layers: Iterable[int]) -> Kept:
    """What the layers of one pipeline chunk keep, recompute considered."""
    layers, recompute = list(layers), sizes.config.recompute
    kept: Kept = {"stream": 0, "attention": 0}
    whole = layers
    if recompute.recompute_granularity == "full":
        number = recompute.recompute_num_layers or 1
        if recompute.recompute_method == "uniform":
            inputs, whole = -(-len(layers) // number), []
        else:
            inputs, whole = min(number, len(layers)), layers[number:]
        kept["stream"] += inputs * sizes.stream
    for layer in whole:
        add(kept, layer_activations(sizes, layer))
    return kept


def recomputed_at_once(sizes: Sizes, layers: Iterable[int]) -> int:
    """The most that recompute makes anew at a time, beyond what has been let go by then."""
    layers, recompute = list(layers), sizes.config.recompute
    if not layers or recompute.recompute_granularity is None:
        return 0
    if recompute.recompute_granularity == "selective":
        return max(_recomputed_part(sizes, layer) for layer in layers)
    of_layer = [sum(layer_activations(sizes, i).values()) for i in layers]
    number = recompute.recompute_num_layers or 1
    if recompute.recompute_method == "uniform":
        return max(sum(of_layer[i : i + number]) for i in range(0, len(layers), number))
    # The last layers are kept, and let go before the first ones are computed again.
    return max(0, max(of_layer[:number]) - sum(of_layer[number:]))


def _recomputed_part(sizes: Sizes, layer: int) -> int:
    """Of one layer under selective recompute: a block with the norm before it."""
    plain = dataclasses.replace(sizes.config, recompute=RecomputeConfig())
    whole = layer_activations(dataclasses.replace(sizes, config=plain), layer)
    kept = layer_activations(sizes, layer)
    anew = {part: size - kept[part] for part, size in whole.items()}
    norm = anew.pop("stream") // 2
    if sizes.recomputes("mlp") and not sizes.recomputes("memory"):
        # A memory beside an MLP is computed again with it.
        anew["mlp"] = anew.pop("mlp", 0) + anew.pop("memory", 0)
    # The block's output and its gradient, too.
    return norm + max(anew.values()) + 2 * sizes.stream


def passed_activations(sizes: Sizes, *, is_first: bool, is_last: bool) -> int:
    """What a pipeline stage keeps of what it receives and sends on, beyond its layers' inputs."""
    kept = 0
    recomputes_all = sizes.config.recompute.recompute_granularity == "full"
    if not is_first and _is_decomposed(sizes) and sizes.element == 2 and not recomputes_all:
        kept += sizes.stream
    if not is_last and sizes.layers == "local on CPU":
        kept += sizes.stream  # Megatron frees it on GPUs once it is sent
    return kept


def embedding_activations(sizes: Sizes) -> int:
    """Of the embedding, without its output, which is the first layer's input."""
    config = sizes.config
    ids = sizes.tokens * 8
    # Tensor-parallel ranks look up masked ids, and keep the mask.
    masked = sizes.tokens * (8 + 1) if sizes.ranks > 1 else 0
    return ids + masked + (_dropout_mask(sizes) if config.model.hidden_dropout else 0)


def output_activations(sizes: Sizes, padded_vocab_size: int) -> int:
    """Of the final norm, the output layer and the loss."""
    # The loss, labels, mask, and in which rank's vocabulary a label is.
    per_token = 4 + 8 + 4 + 8 + 1
    kept = _norm_and_input(sizes, final=True) + sizes.tokens * per_token
    return kept + probability_bytes(sizes, padded_vocab_size)


def probability_bytes(sizes: Sizes, padded_vocab_size: int) -> int:
    """Of the loss's softmax over the vocabulary, fp32."""
    return sizes.tokens * (padded_vocab_size // sizes.ranks) * 4


def add(kept: Kept, more: Kept) -> None:
    """Sum by parts, in place."""
    for part, size in more.items():
        kept[part] = kept.get(part, 0) + size


def _norm_and_input(sizes: Sizes, *, final: bool = False) -> int:
    """A norm's input, which is the residual, its output, and what it keeps besides."""
    rows, width = sizes.own_tokens, sizes.config.model.hidden_size
    inputs = sizes.stream
    if sizes.recomputes("layernorm") and not final:
        return inputs
    decomposed = _is_decomposed(sizes)
    if decomposed and sizes.element == 2:
        inputs = 0  # its fp32 copy is kept
    return inputs + _norm(sizes, rows, width)


def _is_decomposed(sizes: Sizes) -> bool:
    """torch's RMSNorm on the CPU keeps its fp32 input and the normalised input."""
    return sizes.layers == "local on CPU" and sizes.config.model.normalization == "RMSNorm"


def _norm(sizes: Sizes, rows: int, width: int) -> int:
    """A norm's output and what else it makes and keeps."""
    statistics = rows * 4
    if sizes.config.model.normalization == "LayerNorm":
        statistics = 2 * rows * (sizes.element if sizes.layers == "local on CPU" else 4)
    kept = rows * width * sizes.element + statistics
    if _is_decomposed(sizes):
        copies = 2 if sizes.element == 2 else 1
        kept += copies * rows * width * 4
    return kept


def _dropout_mask(sizes: Sizes) -> int:
    return sizes.own_tokens * sizes.config.model.hidden_size * _mask_element(sizes)


def _mask_element(sizes: Sizes) -> int:
    """Bytes of a dropout's mask: torch keeps it as booleans on GPUs, as factors on the CPU."""
    return sizes.element if sizes.layers == "local on CPU" else 1


def _dropout(sizes: Sizes) -> int:
    return _dropout_mask(sizes) if sizes.config.model.hidden_dropout else 0


def _attention(sizes: Sizes) -> int:
    model, e = sizes.config.model, sizes.element
    tokens = sizes.tokens * e
    width = model.num_attention_heads * model.kv_channels // sizes.ranks
    groups = max(1, model.num_query_groups // sizes.ranks) * model.kv_channels
    is_unfused = sizes.layers != "transformer_engine"
    # Queries, keys and values, then the weighted values.
    kept = tokens * (2 * width + 2 * groups)
    if is_unfused and groups < width and not sizes.recomputes("core_attn"):
        # Keys and values are repeated for every head, and the projection's output is let go.
        kept = tokens * 4 * width
    elif model.position_embedding_type == "rope":
        kept += tokens * (width + groups)
    if model.position_embedding_type == "rope" and is_unfused:
        kept += 4 * sizes.positions * int(model.kv_channels * model.rotary_percent) * e
    if model.qk_layernorm:
        kept += _head_norms(sizes, width, groups)
    if not is_unfused:
        # Fused attention keeps the softmax's normalisation alone.
        return kept + sizes.tokens * (width // model.kv_channels) * 4
    return kept if sizes.recomputes("core_attn") else kept + _attention_scores(sizes)


def _head_norms(sizes: Sizes, width: int, groups: int) -> int:
    """Of queries and keys. Rotated or repeated, their outputs are let go."""
    channels = sizes.config.model.kv_channels
    rows = sizes.tokens * (width + groups) // channels
    kept = _norm(sizes, rows, channels)
    if sizes.config.model.position_embedding_type == "rope" or groups < width:
        kept -= rows * channels * sizes.element
    if groups < width and not (_is_decomposed(sizes) and sizes.element == 2):
        # Keys as they were projected, and queries copied from there to be heads.
        kept += sizes.tokens * (2 * width + 2 * groups) * sizes.element
    return kept


def _attention_scores(sizes: Sizes) -> int:
    """Of unfused attention."""
    model, e = sizes.config.model, sizes.element
    heads = model.num_attention_heads // sizes.ranks
    squares = sizes.tokens * sizes.positions * heads
    in_fp32 = e == 2 and sizes.config.precision.attention_softmax_in_fp32
    kept = squares * (4 if in_fp32 else e)
    if model.attention_dropout:
        kept += squares * (_mask_element(sizes) + e)
    elif in_fp32:
        kept += squares * e
    return kept + sizes.positions**2


def _mlp(sizes: Sizes, layer: int) -> int:
    model = sizes.config.model
    if layer in expert_layers(sizes.config):
        # Each token visits so many experts, on average as many on every rank.
        share = model.moe_router_topk * model.moe_ffn_hidden_size
        dispatched = 2 * model.moe_router_topk * model.hidden_size
        return sizes.tokens * sizes.element * (_inner(sizes) * share + dispatched) // sizes.ranks
    inner = model.ffn_hidden_size // sizes.ranks
    return sizes.tokens * sizes.element * _inner(sizes) * inner


def _inner(sizes: Sizes) -> int:
    """Tensors of an MLP's inner width that are kept."""
    if not sizes.config.model.swiglu:
        return 2  # before and after the GELU
    # The projection, twice the width, and the product; unfused, both factors too.
    return 5 if sizes.layers == "local on CPU" else 3


def _memory_layer(sizes: Sizes) -> int:
    config, e = sizes.config, sizes.element
    memory, neighbours = config.memory, config.memory.parallel_size
    rows = memory.num_heads * (memory.top_k + memory.num_random_values)
    is_shared = neighbours > 1 or sizes.own_tokens < sizes.tokens
    kept = _routing(sizes, is_shared)
    if is_shared:
        kept += sizes.tokens * neighbours * rows * 8
    elements = sizes.tokens * (memory.value_dim // sizes.ranks)
    if sizes.recomputes("memory"):
        # What the neighbours sent is kept, and not asked for again.
        return kept + elements * e * (neighbours > 1) + _sigmoid_gate(sizes)
    if memory.variant == "memory+":
        # The gate's projection, the sums before the gate and after it; where the sums come from
        # neighbours, the gate's silu too.
        kept += elements * e * (3 if neighbours == 1 else 4)
    elif projects_output(config):
        kept += elements * e
    elif memory.variant == "peer":
        kept += _experts_of_rows(sizes, rows)
    if memory.value_dropout:
        kept += elements * _mask_element(sizes)
    return kept + _sigmoid_gate(sizes)


def _sigmoid_gate(sizes: Sizes) -> int:
    """The output that it multiplies, and its own."""
    if not sizes.config.memory.gated:
        return 0
    return sizes.own_tokens * (sizes.config.model.hidden_size + 1) * sizes.element


def _routing(sizes: Sizes, is_shared: bool) -> int:
    """Queries, and the slots and weights of this rank's own tokens; what is shared is kept as it
    was gathered, and by what made it."""
    memory, own = sizes.config.memory, sizes.own_tokens
    best = memory.num_heads * memory.top_k
    rows = best + memory.num_heads * memory.num_random_values
    queries = own * memory.num_heads * memory.key_dim
    kept = queries * sizes.element
    slots = [rows]
    if memory.num_random_values:  # the best and the random ones, then both
        slots = [best, rows - best] + [rows] * (not is_shared)
    weights = [rows]
    if memory.softmax_sink:  # with the sink's, then without
        weights = [rows + memory.num_heads] + [rows] * (not is_shared)
    kept += own * 4 * (sum(slots) + sum(weights))
    if memory.query_dropout:
        kept += queries * _mask_element(sizes)
    if memory.qk_norm:
        keys = memory.num_heads * memory.num_half_keys * memory.key_dim
        halves = own * memory.num_heads * 2 + memory.num_heads * 2 * memory.num_half_keys
        # In fp32: the input where it is a copy, normalised, and each half's root mean square.
        kept += (queries + keys) * (4 + sizes.element) + halves * 4
        if sizes.element == 2:
            kept += keys * 4 + queries * (4 - sizes.element) + 2 * memory.key_dim * 4
    return kept


def _experts_of_rows(sizes: Sizes, rows: int) -> int:
    """PEER's dot products, and where columns are shared what they are multiplied by and into."""
    config, e = sizes.config, sizes.element
    neighbours = config.memory.parallel_size
    products = sizes.tokens * neighbours * rows * 4
    if neighbours * sizes.ranks == 1:
        return products
    inputs = 0
    if neighbours > 1:
        inputs = sizes.tokens * (config.memory.value_dim // sizes.ranks) * e
    elif config.parallel.sequence_parallel:
        inputs = sizes.tokens * config.model.hidden_size * e
    return 3 * products + inputs
