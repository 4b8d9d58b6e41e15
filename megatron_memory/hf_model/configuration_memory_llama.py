# Copyright 2026 The megatron-memory authors.
# SPDX-License-Identifier: Apache-2.0
"""Configuration of Llama with memory layers ("Memory Layers at Scale", arXiv 2412.09764)."""

import transformers
from transformers import LlamaConfig

_VARIANTS = ("pkm", "memory+", "peer")
_SHARE_SCOPES = ("model", "stage", "layer")


class MemoryLlamaConfig(LlamaConfig):
    """Llama's configuration, and what memory layers add to it.

    A table of values has N * N rows, N the number of half-keys.

    Args:
        qkv_bias: biases of the attention's query, key and value projections alone, as in Qwen2;
            `attention_bias` has them in the output projection, too.
        qk_norm: an RMSNorm of each attention head's query and key, as in Qwen3.
        memory_layers: layers with a memory, counted from 0.
        memory_variant: "pkm", the weighted sum of values itself; "memory+", gated by silu of a
            projection of the input, then projected; "peer", rows as single-neuron experts.
        memory_beside_mlp: the layer keeps its MLP, and its output is the sum of both; else the
            memory is in the MLP's place.
        memory_num_heads: heads, each with its own query and two sets of half-keys.
        memory_top_k: values that each head reads for a token.
        memory_num_half_keys: N.
        memory_key_dim: width of a key, both halves together; half of `memory_value_dim` if None.
        memory_value_dim: width of a table row; `hidden_size` if None.
        memory_gated: multiply the layer's output by a sigmoid of a projection of its input.
        memory_qk_norm: RMSNorm of the memory's queries and keys.
        memory_softmax_sink: an extra logit in each head's softmax, which reads nothing.
        memory_share_scope: one table for all memory layers ("model"), one for each of
            `memory_share_groups` ("stage"), or one for each layer ("layer").
        memory_share_groups: with "stage", the layers that share a table.
        memory_num_random_values: random rows that each head reads too while training.
        memory_query_dropout: dropout of the queries.
        memory_value_dropout: dropout of the weighted sum of values.
        memory_max_chunk_elements: a larger table is several parameters, cut by rows.
        kwargs: as LlamaConfig's.

    Raises:
        ValueError: settings that do not fit together.
    """

    model_type = "memory_llama"
    # Llama's plans for tensor and pipeline parallelism know no memory.
    base_model_tp_plan = None
    base_model_pp_plan = None

    def __init__(
        self,
        qkv_bias=False,
        qk_norm=False,
        memory_layers=(),
        memory_variant="memory+",
        memory_beside_mlp=False,
        memory_num_heads=4,
        memory_top_k=32,
        memory_num_half_keys=1024,
        memory_key_dim=None,
        memory_value_dim=None,
        memory_gated=False,
        memory_qk_norm=False,
        memory_softmax_sink=False,
        memory_share_scope="model",
        memory_share_groups=None,
        memory_num_random_values=0,
        memory_query_dropout=0.0,
        memory_value_dropout=0.0,
        memory_max_chunk_elements=2**30,
        **kwargs,
    ):
        super().__init__(**_known_rope_names(kwargs))
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.memory_layers = sorted(memory_layers)
        self.memory_variant = memory_variant
        self.memory_beside_mlp = memory_beside_mlp
        self.memory_num_heads = memory_num_heads
        self.memory_top_k = memory_top_k
        self.memory_num_half_keys = memory_num_half_keys
        self.memory_value_dim = memory_value_dim or self.hidden_size
        self.memory_key_dim = memory_key_dim or self.memory_value_dim // 2
        self.memory_gated = memory_gated
        self.memory_qk_norm = memory_qk_norm
        self.memory_softmax_sink = memory_softmax_sink
        self.memory_share_scope = memory_share_scope
        self.memory_share_groups = memory_share_groups
        self.memory_num_random_values = memory_num_random_values
        self.memory_query_dropout = memory_query_dropout
        self.memory_value_dropout = memory_value_dropout
        self.memory_max_chunk_elements = memory_max_chunk_elements
        self._check()

    @property
    def memory_projects_output(self):
        """Whether a projection follows the lookup."""
        if self.memory_variant == "pkm":
            return self.memory_value_dim != self.hidden_size
        return self.memory_variant == "memory+"

    def memory_pools(self):
        """The layers that read each table (PEER: each pair of tables), by the tables' name."""
        layers = self.memory_layers
        if not layers:
            return {}
        if self.memory_share_scope == "layer":
            return {f"layer_{layer}": [layer] for layer in layers}
        groups = [layers]
        if self.memory_share_scope == "stage":
            groups = sorted(sorted(group) for group in self.memory_share_groups)
        if groups == [layers]:
            return {"shared": layers}
        words = {True: "layer", False: "layers"}
        return {
            "_".join([words[len(group) == 1], *(str(layer) for layer in group)]): group
            for group in groups
        }

    def memory_chunk_rows(self):
        """The rows of each of a table's parameters, in order; only the last may have fewer."""
        return chunk_rows(
            self.memory_num_half_keys**2, self.memory_value_dim, self.memory_max_chunk_elements
        )

    def _check(self):
        _check_choice("memory_variant", self.memory_variant, _VARIANTS)
        _check_choice("memory_share_scope", self.memory_share_scope, _SHARE_SCOPES)
        layers = self.memory_layers
        if len(set(layers)) != len(layers) or set(layers) - set(range(self.num_hidden_layers)):
            raise ValueError(
                f"memory_layers={layers}: different layers of 0 to {self.num_hidden_layers - 1} "
                "wanted."
            )
        if self.memory_share_scope == "stage":
            groups = self.memory_share_groups or []
            if sorted(layer for group in groups for layer in group) != layers:
                raise ValueError(
                    f"memory_share_groups={self.memory_share_groups} does not name each of "
                    f"memory_layers={layers} once."
                )
        self._check_shapes()

    def _check_shapes(self):
        if not 1 <= self.memory_top_k <= self.memory_num_half_keys:
            raise ValueError(
                f"memory_top_k={self.memory_top_k}: 1 to "
                f"memory_num_half_keys={self.memory_num_half_keys} wanted."
            )
        if self.memory_key_dim % 2:
            raise ValueError(f"memory_key_dim={self.memory_key_dim} is odd: a key has two halves.")
        if self.memory_variant == "peer" and self.memory_value_dim != self.hidden_size:
            raise ValueError(
                f"memory_value_dim={self.memory_value_dim} differs from "
                f"hidden_size={self.hidden_size}: peer multiplies rows by the layer's input."
            )


def chunk_rows(num_rows, width, max_elements):
    """The rows of each parameter of a table, as even as can be; only the last may have fewer."""
    most = max(1, max_elements // width)
    rows = -(-num_rows // -(-num_rows // most))
    return [min(rows, num_rows - first) for first in range(0, num_rows, rows)]


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name}={value!r}: one of {', '.join(map(repr, choices))} wanted.")


def _known_rope_names(settings):
    """`rope_parameters`, as transformers 5 writes them, for transformers 4, which would ignore
    them."""
    parameters = settings.get("rope_parameters")
    if parameters is None or int(transformers.__version__.split(".")[0]) >= 5:
        return settings
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    settings = {name: value for name, value in settings.items() if name != "rope_parameters"}
    settings["rope_theta"] = parameters["rope_theta"]
    if scaling.get("rope_type", "default") != "default":
        settings["rope_scaling"] = scaling
    return settings
