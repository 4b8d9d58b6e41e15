# Copyright 2026 The megatron-memory authors.
# SPDX-License-Identifier: Apache-2.0
"""Llama with memory layers ("Memory Layers at Scale", arXiv 2412.09764), for transformers.

Axes: T tokens, H heads, N half-keys, K values read per head, B = H * K, S slots (N * N) and so rows
of a table, D its columns. Slot i * N + j has the concatenation of half-keys i and j for its key.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.models.llama import modeling_llama as llama

from .configuration_memory_llama import MemoryLlamaConfig

# Keys begin with a mean square of 1 / (3 * key_dim): a model's usual epsilon would be felt.
_QK_NORM_EPSILON = 1e-8
# Of the rows that PEER gathers at once, in fp32: 64 MiB.
_MAX_GATHERED_ELEMENTS = 2**24


class TableRows(nn.Module):
    """Consecutive rows of a value table: the parameter, and nothing else."""

    def __init__(self, num_rows, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))

    def forward(self, function, *arguments):
        """`function(weight, *arguments)` on the weight's device, for the arguments' own.

        A call of the module, since device maps and offloading hang on those.
        """
        device = arguments[-1].device
        return function(self.weight, *(a.to(self.weight.device) for a in arguments)).to(device)


class MemoryTable(nn.Module):
    """S rows of D values; large ones are several parameters."""

    def __init__(self, config):
        super().__init__()
        self.chunk_rows = config.memory_chunk_rows()
        self.width = config.memory_value_dim
        self.chunks = nn.ModuleList(TableRows(rows, self.width) for rows in self.chunk_rows)

    def weighted_sum(self, indices, weights):
        """y[t] = sum over b of weights[t, b] * row indices[t, b]: [T, B] each to [T, D]."""
        parts = []
        for chunk, here, first_row in self._reads(indices):
            counts = here.sum(dim=1)
            bags = indices[here] - first_row, counts.cumsum(0) - counts
            parts.append(chunk(_sum_rows, *bags, weights[here]))
        return sum(parts[1:], parts[0])

    def row_dot(self, indices, x):
        """h[t, b] = x[t] . row indices[t, b], in fp32: [T, B] and [T, D] to [T, B]."""
        size = max(1, _MAX_GATHERED_ELEMENTS // (indices.shape[1] * self.width))
        pieces = zip(indices.split(size), x.split(size), strict=True)
        # Without the checkpoint, backward would keep all gathered rows.
        dots = [checkpoint(self._dot_gathered, *piece, use_reentrant=False) for piece in pieces]
        return torch.cat(dots)

    def _dot_gathered(self, indices, x):
        return torch.bmm(self._gather(indices).float(), x.float().unsqueeze(-1)).squeeze(-1)

    def _gather(self, indices):
        """The rows [T, B, D] that indices [T, B] name."""
        if len(self.chunks) == 1:
            return self.chunks[0](_take_rows, indices)
        parts, places = [], []
        for chunk, here, first_row in self._reads(indices):
            parts.append(chunk(_take_rows, indices[here] - first_row))
            places.append(here.flatten().nonzero().squeeze(-1))
        in_order = torch.cat(parts)[torch.cat(places).argsort()]
        return in_order.view(*indices.shape, self.width)

    def _reads(self, indices):
        """For each chunk: it, the reads [T, B] that fall to it, and its first row."""
        first_row = 0
        for rows, chunk in zip(self.chunk_rows, self.chunks, strict=True):
            yield chunk, (indices >= first_row) & (indices < first_row + rows), first_row
            first_row += rows


def _sum_rows(table, indices, offsets, weights):
    return F.embedding_bag(
        indices, table, offsets, mode="sum", per_sample_weights=weights.to(table.dtype)
    )


def _take_rows(table, indices):
    return F.embedding(indices, table)


class PoolTables(nn.Module):
    """The tables that some layers share: `values`, or PEER's `values_u` and `values_v`."""

    def __init__(self, config):
        super().__init__()
        for name in ("values_u", "values_v") if config.memory_variant == "peer" else ("values",):
            self.add_module(name, MemoryTable(config))


class MemoryRouter(nn.Module):
    """From tokens to slots: query, product keys, the slots' weights."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        heads, key_dim = config.memory_num_heads, config.memory_key_dim
        self.query = nn.Linear(config.hidden_size, heads * key_dim)
        self.keys = nn.Parameter(torch.empty(heads, 2, config.memory_num_half_keys, key_dim // 2))
        if config.memory_qk_norm:
            self.query_norm = nn.Parameter(torch.ones(key_dim))
            self.key_norm = nn.Parameter(torch.ones(key_dim))
        if config.memory_softmax_sink:
            self.sink = nn.Parameter(torch.zeros(heads))

    def forward(self, x):
        """x [T, hidden] to indices and weights (fp32), [T, H, K + random values] each."""
        config = self.config
        query, keys = self.query(x).unflatten(-1, (config.memory_num_heads, -1)), self.keys
        if config.memory_qk_norm:
            query = _rms_norm_halves(query.unflatten(-1, (2, -1)), self.query_norm).flatten(-2)
            keys = _rms_norm_halves(keys.transpose(1, 2), self.key_norm).transpose(1, 2)
        query = F.dropout(query, config.memory_query_dropout, self.training)
        half_scores = _half_scores(query, keys)
        indices = _best_slots(half_scores.detach(), config.memory_top_k)
        if self.training and config.memory_num_random_values:
            shape = (*indices.shape[:2], config.memory_num_random_values)
            drawn = torch.randint(config.memory_num_half_keys**2, shape, device=indices.device)
            indices = torch.cat((indices, drawn), dim=-1)
        return indices.transpose(0, 1), self._softmax(_scores_of(half_scores, indices))

    def _softmax(self, scores):
        """[H, T, K] to [T, H, K]; a sink takes part in the sum and reads nothing."""
        scores = scores.transpose(0, 1)
        if not self.config.memory_softmax_sink:
            return scores.softmax(dim=-1)
        sink = self.sink.float()[None, :, None].expand(len(scores), -1, 1)
        return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]


def _rms_norm_halves(halves, gain):
    """RMSNorm of each half-vector, [..., 2, Dk / 2], in fp32."""
    normed = F.rms_norm(halves.float(), halves.shape[-1:], eps=_QK_NORM_EPSILON)
    return (normed * gain.float().view(2, -1)).to(halves.dtype)


def _half_scores(query, keys):
    """Scores of both sets of half-keys, [2, H, T, N] in fp32; query [T, H, Dk], keys [H, 2, N,
    Dk / 2]."""
    with torch.autocast(query.device.type, enabled=False):
        halves = query.float().unflatten(-1, (2, -1)).permute(2, 1, 0, 3)
        return halves @ keys.float().permute(1, 0, 3, 2)


def _scores_of(half_scores, slots):
    """The scores of slots [H, T, K]."""
    num_half_keys = half_scores.shape[-1]
    first = half_scores[0].gather(-1, slots // num_half_keys)
    return first + half_scores[1].gather(-1, slots % num_half_keys)


def _best_slots(half_scores, k):
    """The k slots of highest score of each head, best first, [H, T, K]."""
    num_half_keys = half_scores.shape[-1]
    best = _topk(half_scores, torch.arange(num_half_keys, device=half_scores.device), k)
    scores = half_scores.gather(-1, best)
    # Any other pair of ranks is below k pairs that are no worse.
    ranks = torch.arange(1, k + 1, device=half_scores.device)
    i, j = (ranks[:, None] * ranks <= k).nonzero(as_tuple=True)
    slots = best[0][..., i] * num_half_keys + best[1][..., j]
    winners = _topk(scores[0][..., i] + scores[1][..., j], slots, k)
    return slots.gather(-1, winners)


def _topk(scores, index, k):
    """Positions of the k highest of the last dimension; of equal ones the lower index first.

    torch.topk leaves the order of equal scores open, so rows that have any are sorted again.
    """
    # One more than wanted shows a tie across the border.
    best = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    positions = best.indices[..., :k].contiguous()
    tied = (best.values[..., 1:] == best.values[..., :-1]).any(dim=-1)
    if tied.any():
        by_index = index.expand_as(scores)[tied].argsort(dim=-1)
        by_score = scores[tied].gather(-1, by_index).sort(dim=-1, descending=True, stable=True)
        positions[tied] = by_index.gather(-1, by_score.indices[..., :k])
    return positions


class MemoryLayer(nn.Module):
    """Reads B = H * K rows of a value table for each token.

    | variant | output, y the weighted sum of rows |
    |---|---|
    | pkm | y; with a value dimension other than the hidden size, `value_proj` y |
    | memory+ | `value_proj` (y * silu(`value_gate` x)) |
    | peer | sum of weight * gelu(u . x) * v over the slots' rows u and v of two tables |

    With `memory_gated` all of that is multiplied by sigmoid(`output_gate` x). The tables are the
    model's, which binds them before it runs.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.router = MemoryRouter(config)
        self.value_gate = self.value_proj = self.output_gate = None
        if config.memory_variant == "memory+":
            self.value_gate = _linear(config, config.hidden_size, config.memory_value_dim)
        if config.memory_projects_output:
            self.value_proj = _linear(config, config.memory_value_dim, config.hidden_size)
        if config.memory_gated:
            self.output_gate = _linear(config, config.hidden_size, 1)

    def bind(self, tables):
        """Hold the tables that this layer reads, without becoming their owner."""
        self.__dict__["tables"] = tables

    def forward(self, hidden_states):
        """[..., hidden] to the same shape."""
        x = hidden_states.flatten(0, -2)
        indices, weights = (route.flatten(1) for route in self.router(x))
        y = self._read(x, indices, weights)
        y = F.dropout(y, self.config.memory_value_dropout, self.training)
        if self.value_proj is not None:
            y = self.value_proj(y)
        if self.output_gate is not None:
            y = y * torch.sigmoid(self.output_gate(x))
        return y.view(hidden_states.shape)

    def _read(self, x, indices, weights):
        tables = self.__dict__["tables"]
        if self.config.memory_variant == "peer":
            products = tables.values_u.row_dot(indices, x)
            return tables.values_v.weighted_sum(indices, weights * F.gelu(products))
        y = tables.values.weighted_sum(indices, weights)
        if self.value_gate is None:
            return y
        return (y.float() * F.silu(self.value_gate(x).float())).to(y.dtype)


def _linear(config, num_inputs, num_outputs):
    linear = nn.Linear(num_inputs, num_outputs)
    linear.memory_init_std = config.hidden_size**-0.5
    return linear


class MemoryAndMLP(llama.LlamaMLP):
    """Llama's MLP with a memory layer beside it; the output is the sum."""

    def __init__(self, config):
        super().__init__(config)
        self.memory = MemoryLayer(config)

    def forward(self, x):
        """[..., hidden] to the same shape."""
        return super().forward(x) + self.memory(x)


class MemoryLlamaAttention(llama.LlamaAttention):
    """Llama's attention, with biases as in Qwen2 and norms as in Qwen3 where the model has them."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if config.qkv_bias:
            for projection in (self.q_proj, self.k_proj, self.v_proj):
                projection.bias = nn.Parameter(torch.zeros(projection.out_features))
        if config.qk_norm:
            self.q_norm = llama.LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = llama.LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, *args, **kwargs
    ):
        """As LlamaAttention's."""
        if not self.config.qk_norm:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, *args, **kwargs
            )
        cache = _take_cache(kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        cos, sin = position_embeddings
        query, key = llama.apply_rotary_pos_emb(query, key, cos, sin)
        if cache is not None:
            options = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
            key, value = cache.update(key, value, self.layer_idx, options)
        output, weights = self._attention_function(attention_mask, kwargs)(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights

    def _attention_function(self, mask, options):
        name = self.config._attn_implementation
        # transformers 4.51 has the eager function return the weights that others do not, and makes
        # it a mask to add. Without such a mask it would attend to later tokens.
        is_added = mask is not None and mask.is_floating_point()
        if name == "eager" or (options.get("output_attentions") and is_added):
            return llama.eager_attention_forward
        return llama.ALL_ATTENTION_FUNCTIONS[name]


def _take_cache(options):
    """By its type, for its name changes: `past_key_value` before transformers 4.56, `cache` since
    5.24. One that was overlooked would give wrong text without an error."""
    names = [name for name, value in options.items() if isinstance(value, Cache)]
    caches = [options.pop(name) for name in names]
    for name in ("past_key_value", "past_key_values", "cache"):
        options.pop(name, None)
    return caches[0] if caches else None


class MemoryLlamaDecoderLayer(llama.LlamaDecoderLayer):
    """Llama's layer, with a memory in the MLP's place or beside it where the model has one."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.self_attn = MemoryLlamaAttention(config, layer_idx)
        if layer_idx in config.memory_layers:
            self.mlp = MemoryAndMLP(config) if config.memory_beside_mlp else MemoryLayer(config)

    @property
    def memory(self):
        """The memory layer, or None."""
        layer = getattr(self.mlp, "memory", self.mlp)
        return layer if isinstance(layer, MemoryLayer) else None


class MemoryLlamaPreTrainedModel(llama.LlamaPreTrainedModel):
    """What both models tell transformers of theirs."""

    config_class = MemoryLlamaConfig
    _no_split_modules = ["MemoryLlamaDecoderLayer", "TableRows"]
    # How many rows are read of each chunk of a table depends on the tokens.
    _can_compile_fullgraph = False

    def _init_weights(self, module):
        """After the paper's released settings. Functions of nn.init spare what was loaded."""
        config = self.config
        if isinstance(module, TableRows):
            nn.init.normal_(module.weight, std=config.memory_value_dim**-0.5)
        elif isinstance(module, MemoryRouter):
            bound = config.memory_key_dim**-0.5
            nn.init.uniform_(module.keys, -bound, bound)
            nn.init.xavier_uniform_(module.query.weight)
            nn.init.zeros_(module.query.bias)
            if config.memory_qk_norm:
                nn.init.ones_(module.query_norm)
                nn.init.constant_(module.key_norm, config.memory_key_dim**-0.5)
            if config.memory_softmax_sink:
                nn.init.zeros_(module.sink)
        elif hasattr(module, "memory_init_std"):
            nn.init.normal_(module.weight, std=module.memory_init_std)
            nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class MemoryLlamaModel(MemoryLlamaPreTrainedModel, llama.LlamaModel):
    """The decoder without an output layer; owner of the value tables."""

    def __init__(self, config):
        # Not LlamaModel's, which would build layers of its own.
        llama.LlamaPreTrainedModel.__init__(self, config)
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MemoryLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = llama.LlamaRotaryEmbedding(config=config)
        self.memory_tables = nn.ModuleDict(
            {name: PoolTables(config) for name in config.memory_pools()}
        )
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, *args, **kwargs):
        """As LlamaModel's."""
        # Each time: copies of the model, nn.DataParallel's for one, have tables of their own.
        for name, layers in self.config.memory_pools().items():
            for i in layers:
                self.layers[i].memory.bind(self.memory_tables[name])
        return super().forward(*args, **kwargs)


class MemoryLlamaForCausalLM(MemoryLlamaPreTrainedModel, llama.LlamaForCausalLM):
    """The decoder with its output layer; generates."""

    def __init__(self, config):
        # Not LlamaForCausalLM's, which would build a LlamaModel.
        llama.LlamaPreTrainedModel.__init__(self, config)
        self.model = MemoryLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
