"""From tokens to slots: query, product keys, the slots' weights.

Axes: T tokens, H heads, K values read per head, N half-keys, S slots (N * N).
"""

import contextlib
import dataclasses

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import MegatronModule
from torch import Tensor

from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.memory.group import MemoryGroup
from megatron_memory.memory.initialization import init_keys_
from memory_kernels import product_key_topk
from memory_kernels.product_key import product_key_scores

# Keys begin with a mean square of 1 / (3 * key_dim), 1.6e-4 for a key of 2048: the model's own
# epsilon, 1e-5, would be felt.
_QK_NORM_EPSILON = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """Where tokens read, best first within a head."""

    indices: Tensor
    """[T, H, K + random values], int32 or int64."""
    scores: Tensor
    """The same shape, fp32: before the softmax."""
    weights: Tensor
    """The same shape, fp32: after it."""


class MemoryRouter(MegatronModule):
    """Query projection, keys and their top-k; replicated on every tensor-parallel rank.

    With sequence parallelism each rank routes its own tokens and its gradients are partial sums,
    which Megatron adds up for parameters marked `sequence_parallel`. Without it every rank routes
    all tokens alike.
    """

    def __init__(self, config: MemoryTransformerConfig):
        super().__init__(config)
        memory = config.memory
        self.num_heads, self.top_k = memory.num_heads, memory.top_k
        self.key_dim = config.memory_key_dim
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        options = dict(dtype=config.params_dtype, device=device)
        self.query = torch.nn.Linear(config.hidden_size, self.num_heads * self.key_dim, **options)
        shape = (self.num_heads, 2, memory.num_half_keys, self.key_dim // 2)
        self.keys = torch.nn.Parameter(torch.empty(shape, **options))
        if memory.qk_norm:
            self.query_norm = torch.nn.Parameter(torch.ones(self.key_dim, **options))
            # As attention divides its scores by the root of the head's width. With gains of 1 the
            # softmax over a head's slots would be nearly one-hot from the first step on.
            gain = torch.full((self.key_dim,), self.key_dim**-0.5, **options)
            self.key_norm = torch.nn.Parameter(gain)
        if memory.softmax_sink:
            self.sink = torch.nn.Parameter(torch.zeros(self.num_heads, **options))
        if config.perform_initialization:
            torch.nn.init.xavier_uniform_(self.query.weight)
            torch.nn.init.zeros_(self.query.bias)
            init_keys_(self.keys, self.key_dim)
        for parameter in self.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)

    def forward(self, x: Tensor) -> Route:
        """Route tokens x [T, hidden] (any leading shape is flattened)."""
        query = self.query(x).view(-1, self.num_heads, self.key_dim)
        query, keys = self._normalize(query, self.keys)
        query = self._dropout(query)
        indices, scores = product_key_topk(query, keys, self.top_k, normalize=False)
        if self.training and self.config.memory.num_random_values:
            indices, scores = self._add_random_slots(query, keys, indices, scores)
        return Route(indices=indices, scores=scores, weights=self._softmax(scores))

    def _normalize(self, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        if not self.config.memory.qk_norm:
            return query, keys
        query = self._rms_norm_halves(query.unflatten(-1, (2, -1)), self.query_norm).flatten(-2)
        # The half is the second axis of the keys, and the one before the last here.
        return query, self._rms_norm_halves(keys.transpose(1, 2), self.key_norm).transpose(1, 2)

    def _rms_norm_halves(self, halves: Tensor, gain: Tensor) -> Tensor:
        """RMSNorm of each half-vector, [..., 2, Dk / 2], in fp32."""
        normed = F.rms_norm(halves.float(), halves.shape[-1:], eps=_QK_NORM_EPSILON)
        return (normed * gain.float().view(2, -1)).to(halves.dtype)

    def _dropout(self, query: Tensor) -> Tensor:
        rate = self.config.memory.query_dropout
        if not rate or not self.training:
            return query
        with routing_randomness(self.config):
            return F.dropout(query, rate)

    def _add_random_slots(self, query, keys, indices, scores) -> tuple[Tensor, Tensor]:
        """Read a few slots drawn uniformly too, at their own scores ("random values" in the
        paper)."""
        shape = (*indices.shape[:2], self.config.memory.num_random_values)
        with routing_randomness(self.config):
            drawn = torch.randint(
                self.config.memory_num_slots, shape, dtype=indices.dtype, device=indices.device
            )
        drawn_scores = product_key_scores(query, keys, drawn)
        return torch.cat((indices, drawn), -1), torch.cat((scores, drawn_scores), -1)

    def _softmax(self, scores: Tensor) -> Tensor:
        """Softmax over a head's slots in fp32; a sink takes part in the sum and reads nothing."""
        if not self.config.memory.softmax_sink:
            return scores.softmax(dim=-1)
        sink = self.sink.float()[None, :, None].expand(scores.shape[0], -1, 1)
        return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]


def routing_randomness(config: MemoryTransformerConfig):
    """The generator for a rank's own tokens: one a rank under sequence parallelism, else one that
    tensor-parallel ranks share. `seed_step` gives data-parallel ranks others at every step."""
    return get_cuda_rng_tracker().fork() if config.sequence_parallel else contextlib.nullcontext()


def share_route(
    route: Route, config: MemoryTransformerConfig, group: MemoryGroup
) -> tuple[Tensor, Tensor]:
    """Every token's (index, weight) on every rank that holds columns: [M * T, H * K] each.

    A rank holds only some columns of the table, so the weights' gradient is a sum over the ranks.
    """
    indices, weights = route.indices.flatten(1), route.weights.flatten(1)
    sequence_parallel = config.sequence_parallel
    return (
        group.gather_tokens(indices, sequence_parallel=sequence_parallel),
        group.gather_tokens(weights, sequence_parallel=sequence_parallel),
    )
