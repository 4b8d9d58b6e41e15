"""More rows: every half-key gets a copy, N half-keys become 2N, N * N rows become 4 N * N.

Half-key i of the N has the copies i and N + i of the 2N. Row i * N + j, of the pair (i, j), has the
four copies i' * 2N + j' with i' = i and j' = j modulo N. Doubling again makes 4N, and so on: after
k times r = 2^k copies of a half-key, r^2 of a row.

**exact.** Copies are equal, and each head reads r^2 K rows in place of K. A pair's r^2 copies have
its score, so that the best r^2 K pairs are the copies of the best K (but for ties between pairs),
and the softmax gives each copy 1 / r^2 of its pair's weight: r^2 copies of v with w / r^2 each add
up to w v. Where a sink takes part in the softmax, its logit s becomes s + ln r^2, for the other
terms of the sum are r^2 times as many. PEER is linear in the weights: the same. The function is
unchanged up to the rounding of sums.

Gradients: a row's copy has 1 / r^2 of its row's gradient; a half-key's copy is in r of the r^2
copies of each of its pairs, each of which has 1 / r^2 of the pair's gradient: 1 / r. Moments that
are linear in the gradient are scaled so, exp_avg_sq by the squares; then Adam moves every copy as
it would have moved the one (up to epsilon and clipping), and training goes on as it would have. All
else has the gradients that it had. Equal copies have equal gradients and stay equal for ever, so
the new half-keys get noise of a chosen relative size, which changes the function; by how much is
measured.

**kept.** K stays, and the new half-keys lose: copy k' = a k of a scale 0 <= a < 1 has the score
a s where k has s. Rows are copied, so that a new pair, when it is read, brings its parent's value.
The function changes where a new pair is read. Of a head let m be the weight that its softmax gives
to new rows, and V the largest norm of its rows. The new pairs displace pairs of lower scores, of
weight d <= m before; the pairs that stay keep their proportions. So the weights change by
(m - d) + d + m = 2 m in sum of absolute values, and the head's sum of rows by at most 2 m V (PEER:
of the rows gelu(u . x) v). With a = 0 new scores are 0, and nothing changes for a token with at
least K half-keys of positive score in each half; but then nothing new is read, and learns, either.
Where queries and keys are normalised (`--memory-qk-norm`), a key's length means nothing: the new
half-keys are turned instead, to a k + sqrt(1 - a^2) |k| n with a random direction n orthogonal to
k.

Moments: what was there keeps its own. New tensors have had no gradient: exp_avg is 0, and
exp_avg_sq their parent's, for updates of its size.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from megatron_memory.config.checks_memory import memory_problems
from megatron_memory.config.flags import all_flags
from megatron_memory.config.problems import raise_problems
from megatron_memory.conversion.growth.tensors import (
    DEGREES,
    changed,
    memory_prefixes,
    rowwise,
    table_names,
)
from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.exceptions import ConfigurationError

Method = Literal["exact", "kept"]
Double = Callable[[Tensor, int], Tensor]
"""Half-keys [H, 2, N, d] and which doubling it is (from 0) to [H, 2, 2N, d]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfKeyGrowth:
    """How half-keys are added."""

    half_keys: int
    """As many as there shall be: the present number times a power of two."""
    method: Method
    """exact: each head reads r * r times as many rows. kept: as many as before."""
    key_noise: float
    """Of the new half-keys: root mean square of the noise, relative to a half-key's own."""
    new_key_scale: float
    """kept: `a` of the module's docstring."""
    seed: int
    """Of the noise."""


def grow_half_keys(state: SavedState, growth: HalfKeyGrowth) -> SavedState:
    """The same model with more half-keys and rows; the module's docstring says how.

    Raises:
        ConfigurationError: there is no memory, or the number of half-keys cannot be reached.
        CheckpointError: the optimizer's states are of an unknown kind.
    """
    memory = state.config.memory
    doublings = _num_doublings(state, growth.half_keys)
    copies = 2**doublings
    exact = growth.method == "exact"
    rows_of_one = copies**2 if exact else 1
    config = dataclasses.replace(
        state.config,
        memory=dataclasses.replace(
            memory,
            num_half_keys=growth.half_keys,
            top_k=memory.top_k * rows_of_one,
            # As large a part of what is read in training.
            num_random_values=memory.num_random_values * rows_of_one,
        ),
    )
    raise_problems(memory_problems(config))
    tables = {name for name, _, _ in table_names(state.config)}
    keys = {f"{prefix}router.keys": i for i, prefix in enumerate(memory_prefixes(state.config))}
    sinks = {f"{prefix}router.sink" for prefix in memory_prefixes(state.config)}

    def change(kind: str | None, name: str, tensor: LazyTensor) -> LazyTensor:
        if name in tables:
            old, new = _factors(kind, exact, copies**2)
            return stretched_table(tensor, memory.num_half_keys, copies, old, new)
        if name in keys:
            double = _double_keys(kind, growth, memory.qk_norm, keys[name])
            return _doubled(tensor, doublings, double)
        if name in sinks and exact and kind is None:
            return rowwise(tensor, lambda sink: sink + math.log(copies**2))
        return tensor

    # Other slots, whose reads nobody has counted.
    return dataclasses.replace(changed(state, change), config=config, usage={})


def _num_doublings(state: SavedState, half_keys: int) -> int:
    memory = state.config.memory
    if not memory.enabled:
        raise ConfigurationError(
            "the model has no memory that could grow: give it one with `add-memory`."
        )
    most = all_flags()["memory_num_half_keys"].option.at_most
    assert most is not None, "slots are counted in 31 bits"
    possible = []
    number = memory.num_half_keys * 2
    while number <= most:
        possible.append(number)
        number *= 2
    if half_keys not in possible:
        choices = ", ".join(map(str, possible)) or "none: a doubling exceeds the limit"
        raise ConfigurationError(
            f"--half-keys {half_keys}: half-keys are doubled, from {memory.num_half_keys} now to "
            f"{most:.0f} at most. Possible: {choices}."
        )
    return possible.index(half_keys) + 1


def _factors(kind: str | None, exact: bool, copies: int) -> tuple[float, float]:
    """By what the original and its copies are multiplied, of `copies` in all that share what the
    one had."""
    if kind is None:
        return 1.0, 1.0
    degree = DEGREES[kind]
    if exact:
        return copies**-degree, copies**-degree
    return 1.0, 0.0 if degree == 1 else 1.0


def are_new(rows: Tensor, half_keys: int, copies: int) -> Tensor:
    """Which rows of a stretched table are not their pairs' first copies; any shape, to bool.

    Args:
        rows: numbers in the stretched table.
        half_keys: N, before.
        copies: r.
    """
    grown = half_keys * copies
    return (rows // grown >= half_keys) | (rows % grown >= half_keys)


def stretched_table(
    table: LazyTensor, half_keys: int, copies: int, old: float = 1.0, new: float = 1.0
) -> LazyTensor:
    """[N * N, D] to [(r N)^2, D]: row i' * r N + j' is row (i' mod N) * N + (j' mod N).

    Args:
        table: one row after the other of the first half-key, then of the second ...
        half_keys: N.
        copies: r.
        old: factor of rows with i' and j' below N.
        new: factor of all others.
    """
    grown, width = half_keys * copies, table.shape[1]

    def read_rows(begin: int, end: int) -> Tensor:
        parts = []
        first, last = begin // grown, -(-end // grown)
        while first < last:
            # Half-keys whose parents follow each other.
            stop = min(last, (first // half_keys + 1) * half_keys)
            parent, number = first % half_keys, stop - first
            rows = table.read_rows(parent * half_keys, (parent + number) * half_keys)
            block = rows.view(number, 1, half_keys, width).repeat(1, copies, 1, 1)
            originals = int(first < half_keys)
            _scale(block[:, :originals], old)
            _scale(block[:, originals:], new)
            part = block.view(number * grown, width)
            top = max(0, begin - first * grown)
            parts.append(part[top : min(number * grown, end - first * grown)])
            first = stop
        return torch.cat(parts)

    return dataclasses.replace(table, shape=(grown * grown, width), read_rows=read_rows)


def _scale(block: Tensor, factor: float) -> None:
    if factor == 0:
        block.zero_()  # whatever it holds
    elif factor != 1:
        block.mul_(factor)


def _doubled(keys: LazyTensor, doublings: int, double: Double) -> LazyTensor:
    """All doublings of half-keys, which fit into memory."""
    heads, halves, number, width = keys.shape

    def read_rows(begin: int, end: int) -> Tensor:
        read = keys.read()
        for doubling in range(doublings):
            read = double(read, doubling)
        return read[begin:end]

    shape = (heads, halves, number << doublings, width)
    return dataclasses.replace(keys, shape=shape, read_rows=read_rows, in_blocks=False)


def _double_keys(kind: str | None, growth: HalfKeyGrowth, qk_norm: bool, layer: int) -> Double:
    """One doubling of a layer's half-keys, or of their moments."""
    if kind is not None:
        old, new = _factors(kind, growth.method == "exact", 2)
        return lambda keys, doubling: torch.cat((keys * old, keys * new), dim=2)

    def double(keys: Tensor, doubling: int) -> Tensor:
        generator = torch.Generator().manual_seed(_seed(growth.seed, layer, doubling))
        wide = keys.float()
        new = wide
        if growth.method == "kept":
            scale = growth.new_key_scale
            new = _turned(wide, scale, generator) if qk_norm else wide * scale
        if growth.key_noise:
            size = wide.square().mean(-1, keepdim=True).sqrt() * growth.key_noise
            new = new + torch.randn(wide.shape, generator=generator) * size
        return torch.cat((keys, new.to(keys.dtype)), dim=2)

    return double


def _turned(keys: Tensor, cosine: float, generator: torch.Generator) -> Tensor:
    """Half-keys [..., d] of the same lengths at a random angle of the given cosine."""
    length = keys.norm(dim=-1, keepdim=True)
    along = keys / length.clamp(min=torch.finfo(keys.dtype).tiny)
    random = torch.randn(keys.shape, generator=generator)
    across = random - (random * along).sum(-1, keepdim=True) * along
    across = across / across.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return keys * cosine + across * length * math.sqrt(1 - cosine**2)


def _seed(seed: int, layer: int, doubling: int) -> int:
    """One for each layer and doubling, and for weights as for main weights."""
    return seed + 1009 * layer + 15_485_863 * (doubling + 1)
