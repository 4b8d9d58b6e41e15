"""Bytes of weights, gradients and optimizer states on a rank, as Megatron allocates them."""

import dataclasses
import math
from collections.abc import Iterable

from megatron_memory.config import Config
from megatron_memory.planning.parameters import Weight, on_rank, size_on_rank

_ALIGNMENT, _BUCKET_MULTIPLE = 64, 128
"""Elements: where parameters of the distributed optimizer start, and what divides a bucket
(`_ParamAndGradBuffer` in megatron-core's param_and_grad_buffer.py)."""
_MIN_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000
"""Elements from which a bucket is closed, where gradients are reduced during backward."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes on one rank, from the first step on."""

    weights: int
    gradients: int
    main_weights: int
    """fp32 copies that bf16 weights are updated through."""
    optimizer_states: int
    update: int = 0
    """fp32 copies of bf16 gradients, which exist during the update alone."""

    @property
    def total(self) -> int:
        """Of all that is there during the whole step."""
        return self.weights + self.gradients + self.main_weights + self.optimizer_states

    def __add__(self, other: "StateBytes") -> "StateBytes":
        return StateBytes(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in dataclasses.fields(self)
            }
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """Parameters of one chunk of a rank whose gradients are reduced together."""

    sizes: tuple[int, ...]
    """Elements of each on this rank."""
    ranks: int
    """Data-parallel ranks with the same parameters."""
    padded: int
    """Elements of Megatron's buffer."""


def state_bytes(config: Config, found: Iterable[Weight], world_size: int) -> StateBytes:
    """Of the weights of one chunk of a rank."""
    total = StateBytes(weights=0, gradients=0, main_weights=0, optimizer_states=0)
    for buffer in buffers(config, found, world_size):
        total += _buffer_bytes(config, buffer)
    return total


def buffers(config: Config, found: Iterable[Weight], world_size: int) -> list[Buffer]:
    """Megatron's buffers for weights of one chunk: of all ranks' weights, and of those that
    data-parallel neighbours share (values, experts)."""
    copies = config.data_parallel_size(world_size) * config.parallel.context_parallel_size
    own: list[Weight] = []
    shared: list[Weight] = []
    splits_experts = config.parallel.expert_model_parallel_size > 1
    for weight in on_rank(config, found):
        is_shared = weight.part == "values" or (weight.part == "experts" and splits_experts)
        (shared if is_shared else own).append(weight)
    groups = ((own, copies), (shared, copies // config.expert_group_size))
    return [_buffer(config, members, ranks) for members, ranks in groups if members]


def _buffer(config: Config, members: list[Weight], ranks: int) -> Buffer:
    sizes = [size_on_rank(config, weight) for weight in members]
    # A parameter with copies on other pipeline ranks has a bucket of its own.
    alone = [size for size, weight in zip(sizes, members, strict=True) if weight.copies]
    together = [size for size, weight in zip(sizes, members, strict=True) if not weight.copies]
    padded = padded_size(config, together, ranks)
    padded += sum(padded_size(config, [size], ranks) for size in alone)
    return Buffer(sizes=tuple(sizes), ranks=ranks, padded=padded)


def padded_size(config: Config, sizes: Iterable[int], ranks: int) -> int:
    """Elements of a buffer for parameters of these sizes."""
    if not config.parallel.use_distributed_optimizer:
        return sum(sizes)
    closes_at = max(_MIN_BUCKET, _BUCKET_PER_RANK * ranks)
    multiple = math.lcm(ranks, _BUCKET_MULTIPLE)
    start = end = 0
    for size in sizes:
        end = _rounded(end, _ALIGNMENT) + size
        if config.parallel.overlap_grad_reduce and end - start >= closes_at:
            start = end = _rounded(end, multiple)
    return _rounded(end, multiple)


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _buffer_bytes(config: Config, buffer: Buffer) -> StateBytes:
    bf16, number = config.precision.bf16, sum(buffer.sizes)
    kept = number
    if config.parallel.use_distributed_optimizer:
        kept = min(number, math.ceil(buffer.padded / buffer.ranks))
    tensors = 2 if config.optimizer.optimizer == "adam" else int(config.optimizer.sgd_momentum > 0)
    reduces_bf16 = gradient_element(config) == 2
    return StateBytes(
        weights=buffer.padded * element(config),
        gradients=buffer.padded * gradient_element(config),
        main_weights=4 * kept if bf16 else 0,
        optimizer_states=4 * tensors * kept,
        update=4 * kept if reduces_bf16 else 0,
    )


def counter_bytes(config: Config, num_layers: int, world_size: int) -> int:
    """Of `--memory-log-usage`: a layer's sums since the last log on every rank, and those since the
    training began shared out over the ranks that read with it.

    Args:
        config: of the run.
        num_layers: memory layers on the pipeline rank.
        world_size: ranks of the run.
    """
    if not config.memory.log_usage:
        return 0
    readers = world_size // config.parallel.pipeline_model_parallel_size
    slots = config.memory.num_values
    return num_layers * (4 * slots + 8 * math.ceil(slots / readers))


def element(config: Config) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.precision.bf16 else 4


def gradient_element(config: Config) -> int:
    """Bytes of a gradient in Megatron's buffers."""
    precision = config.precision
    return 2 if precision.bf16 and not precision.accumulate_allreduce_grads_in_fp32 else 4


def shadow_bytes(config: Config, found: Iterable[Weight]) -> int:
    """Of the values in fp8 that layers read with `--memory-fp8-values`, with a scale a row."""
    memory = config.memory
    if not memory.fp8_values:
        return 0
    columns = memory.value_dim // config.parallel.tensor_model_parallel_size
    columns //= memory.parallel_size
    tables = sum(weight.part == "values" for weight in found)
    return tables * memory.num_values * (columns + 4)
