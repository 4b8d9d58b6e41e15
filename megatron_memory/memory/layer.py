"""The memory layer, in place of a transformer layer's MLP or beside it.

Axes: T tokens, H heads, K values read per head, S slots, D value dimension, C columns of it on this
rank.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    CheckpointWithoutOutput,
    gather_from_tensor_model_parallel_region,
    get_cuda_rng_tracker,
)
from megatron.core.tensor_parallel.mappings import (
    all_to_all_hp2sp,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.utils import init_method_normal
from torch import Tensor

from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.memory.exchange import Exchange
from megatron_memory.memory.group import MemoryGroup
from megatron_memory.memory.routing import MemoryRouter, Route, share_route
from megatron_memory.memory.table import TableRead, ValueTable
from megatron_memory.memory.usage import SlotUsage
from memory_kernels import peer_experts, row_dot, weighted_bag


@dataclasses.dataclass
class MemoryLayerSubmodules:
    """The linear layers, from Megatron's backend (local or Transformer Engine)."""

    linear_fc1: object = None
    """Column-parallel: hidden size to value dimension, the gate of memory+."""
    linear_fc2: object = None
    """Row-parallel: value dimension to hidden size."""


class MemoryLayer(MegatronModule):
    """Reads H * K rows of a value table for each token ("Memory Layers at Scale", section 3).

    | variant | output, y the weighted sum of rows |
    |---|---|
    | `pkm` | y; with a value dimension other than the hidden size, W2 y |
    | `memory+` | W2 (y * silu(W1 x)), W1 `linear_fc1`, W2 `linear_fc2` (the paper's swilu) |
    | `peer` | sum of weight * gelu(u . x) * v over the slots' rows u and v of two tables |

    With the sigmoid gate all of that is multiplied by sigmoid(gate x).

    The tables belong to the model and are bound after it is built; see `bind`.

    With `memory_recompute` the input of `linear_fc2` is not kept for backward, nor what it is made
    of: W1 x, the sums of rows and, with value dropout, its mask. What is kept for them:

    | | kept | computed again |
    |---|---|---|
    | M = 1 | x, indices, weights | W1 x, the sums, the gate |
    | M > 1 | x, the sums received from the neighbours | W1 x, the gate: nothing is sent again |

    Neither the routing nor `linear_fc2` is computed again. Under sequence parallelism W1 gathers x
    once more, over tensor-parallel ranks.
    """

    def __init__(
        self,
        config: MemoryTransformerConfig,
        submodules: MemoryLayerSubmodules,
        group: MemoryGroup,
        **_: object,
    ):
        """`_`: what megatron-core's layers since 0.18 tell their MLPs."""
        super().__init__(config)
        self.group = group
        self.layer_number = 0
        """Counted from 1 over the whole model; Megatron sets it."""
        self.usage: SlotUsage | None = None
        """Counts the slots read in training while it is set."""
        self.router = MemoryRouter(config)
        self.linear_fc1 = self.linear_fc2 = self.gate = None
        if config.memory.variant == "memory+":
            self.linear_fc1 = self._linear_fc1(submodules)
        if config.memory_projects_output:
            self.linear_fc2 = self._linear_fc2(submodules)
        if config.memory.gated:
            self.gate = _sigmoid_gate(config)
        assert self.linear_fc2 is not None or not config.memory_recompute, (
            "check_config refuses recompute where nothing keeps the sums"
        )

    def _linear_fc1(self, submodules: MemoryLayerSubmodules) -> torch.nn.Module:
        return build_module(
            submodules.linear_fc1,
            self.config.hidden_size,
            self.config.memory_value_dim,
            config=self.config,
            init_method=init_method_normal(self.config.hidden_size**-0.5),
            bias=True,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=self.group.tp,
        )

    def _linear_fc2(self, submodules: MemoryLayerSubmodules) -> torch.nn.Module:
        return build_module(
            submodules.linear_fc2,
            self.config.memory_value_dim,
            self.config.hidden_size,
            config=self.config,
            init_method=init_method_normal(self.config.hidden_size**-0.5),
            bias=True,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=self.group.tp,
        )

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's layer number, counted from 1 over the whole model."""
        self.layer_number = layer_number

    def bind(self, tables: MegatronModule) -> None:
        """Hold the tables that this layer reads, without becoming their owner."""
        self.__dict__["tables"] = tables

    def forward(self, x: Tensor, padding_mask: Tensor | None = None):
        """x [s, b, hidden] (s is this rank's share under sequence parallelism) to (output, bias).

        The padding mask is Megatron's for MoE layers and is not used: padding reads slots like any
        token.
        """
        route = self.router(x)
        # A recomputed layer runs twice, of which only the second keeps a graph.
        if self.usage is not None and torch.is_grad_enabled():
            self.usage.record(route)
        if self._is_peer:
            output, bias = self._project(x.shape[1], self._dropout(self._read_peer(x, route)))
        else:
            output, bias = self._read_and_project(x, route)
        if self.gate is not None:
            output = output if bias is None else output + bias
            output, bias = output * torch.sigmoid(self.gate(x)), None
        return output, bias

    @property
    def _is_peer(self) -> bool:
        return self.config.memory.variant == "peer"

    def _read_and_project(self, x: Tensor, route: Route) -> tuple[Tensor, Tensor | None]:
        read, kept = self._reading(x, route)
        if not (self.config.memory_recompute and torch.is_grad_enabled()):
            return self._project(x.shape[1], read(*kept))
        checkpoint = CheckpointWithoutOutput(fp8=self.config.fp8)
        output, bias = self._project(x.shape[1], checkpoint.checkpoint(read, *kept))
        checkpoint.discard_output_and_register_recompute(output)
        # A view has its gradient first: Megatron's recompute of the norm before this layer hangs on
        # the layer's output, and x must be back before `read` computes from it.
        return output.view_as(output), bias

    def _reading(self, x: Tensor, route: Route) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """A function and its arguments; it may be called again with what stands for them.

        Returns:
            of [T, D / TP]: all tokens of the tensor-parallel group, its share of the columns;
            memory+'s are gated.
        """
        indices, weights = share_route(route, self.config, self.group)
        if self.group.num_neighbours == 1:
            return self._sum_gated, (x, indices, weights)
        # Gating before the exchange would need the neighbours' gates: more to send.
        exchange = self.group.begin_columns_to_tokens(self._sum_values(indices, weights))
        return partial(self._gate_received, exchange), (x, exchange.coming)

    def _sum_gated(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        # Behind memory+'s gate, though the values' dropout is before it in the formula: it scales
        # each element, by 0 or 1 / (1 - rate), and so does the gate.
        return self._dropout(self._sum_values(indices, weights, self._project_gate(x)))

    def _gate_received(self, exchange: Exchange, x: Tensor, coming: Tensor) -> Tensor:
        y, gate = self.group.finish_columns_to_tokens(
            exchange, coming, lambda: self._project_gate(x)
        )
        return self._dropout(y if gate is None else y * F.silu(gate))

    def _project_gate(self, x: Tensor) -> Tensor | None:
        """[T, D / TP]: before the silu; None without a gate."""
        return None if self.linear_fc1 is None else self.linear_fc1(x)[0].flatten(0, 1)

    def _sum_values(self, indices: Tensor, weights: Tensor, gate: Tensor | None = None) -> Tensor:
        """[M * T, C]: the weighted sums of rows, times silu(gate) where it is given."""
        values = self._table("values")(weights)
        return weighted_bag(values.chunks, indices, values.operand, gate, **values.options())

    def _read_peer(self, x: Tensor, route: Route) -> Tensor:
        """[T, D / TP]: all tokens of the tensor-parallel group, its share of the columns."""
        indices, weights = share_route(route, self.config, self.group)
        x = self.group.tokens_to_columns(self._share_of_columns(x))
        return self.group.columns_to_tokens(self._sum_experts(indices, weights, x))

    def _sum_experts(self, indices: Tensor, weights: Tensor, x: Tensor) -> Tensor:
        """Sum over b of weights[t, b] * gelu(u . x[t]) * v, for the rows u and v of indices[t, b].

        One operator where a rank has all columns and its gradient goes to both tables or to none.
        Else in parts: one all-reduce of [M * T, H * K] completes the dot products before the GELU.
        """
        table_u, table_v = self._table("values_u"), self._table("values_v")
        if self.group.whole.size() == 1 and table_u.learns == table_v.learns:
            return _sum_whole_experts(table_u(x), table_v(weights), indices)
        u = table_u(x)
        products = row_dot(u.chunks, indices, u.operand, **u.options())
        products = self.group.sum_over_columns(products.float())
        v = table_v(weights * F.gelu(products))
        return weighted_bag(v.chunks, indices, v.operand, **v.options())

    def _share_of_columns(self, x: Tensor) -> Tensor:
        """[T, D / TP]: all tokens of the tensor-parallel group."""
        if self.config.sequence_parallel:
            x = gather_from_sequence_parallel_region(x, group=self.group.tp)
        elif self.group.tp.size() > 1:
            x = copy_to_tensor_model_parallel_region(x, group=self.group.tp)
        columns = self.config.memory_value_dim // self.group.tp.size()
        return x.reshape(-1, x.shape[-1]).narrow(-1, self.group.tp.rank() * columns, columns)

    def _table(self, name: str) -> ValueTable:
        return self.__dict__["tables"].get_submodule(name)

    def _dropout(self, y: Tensor) -> Tensor:
        rate = self.config.memory.value_dropout
        if not rate or not self.training:
            return y
        with get_cuda_rng_tracker().fork():
            return F.dropout(y, rate)

    def _project(self, num_sequences: int, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """From D / TP columns of the tensor-parallel group's tokens to this rank's tokens whole."""
        if self.linear_fc2 is None:
            return self._exchange_columns(y).view(-1, num_sequences, self.config.hidden_size), None
        output, bias = self.linear_fc2(y.view(-1, num_sequences, y.shape[-1]))
        # A view: Megatron's checkpointing would make an autograd output of the parameter itself.
        return output, bias.view_as(bias)

    def _exchange_columns(self, y: Tensor) -> Tensor:
        if self.group.tp.size() == 1:
            return y
        if self.config.sequence_parallel:
            return all_to_all_hp2sp(y, group=self.group.tp)
        return gather_from_tensor_model_parallel_region(y, group=self.group.tp)


def _sum_whole_experts(u: TableRead, v: TableRead, indices: Tensor) -> Tensor:
    """[T, D]; both tables learn, or neither does."""
    main_grads = shadows = None
    if u.main_grad is not None and v.main_grad is not None:
        main_grads = (u.main_grad, v.main_grad)
    if u.shadow is not None and v.shadow is not None:
        shadows = (u.shadow, v.shadow)
    return peer_experts(
        u.chunks, v.chunks, indices, v.operand, u.operand, main_grads=main_grads, shadows=shadows
    )


def _sigmoid_gate(config: MemoryTransformerConfig) -> torch.nn.Linear:
    """One number a token; replicated, on this rank's tokens."""
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    gate = torch.nn.Linear(config.hidden_size, 1, dtype=config.params_dtype, device=device)
    if config.perform_initialization:
        torch.nn.init.normal_(gate.weight, std=config.hidden_size**-0.5)
        torch.nn.init.zeros_(gate.bias)
    for parameter in gate.parameters():
        setattr(parameter, "sequence_parallel", config.sequence_parallel)
    return gate
