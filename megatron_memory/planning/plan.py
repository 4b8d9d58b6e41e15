"""One configuration on one cluster: whether it fits, and how long a step takes."""

import dataclasses

from megatron_memory.config import Config
from megatron_memory.planning.memory import RankMemory, fullest, rank_memories
from megatron_memory.planning.roofline import Cluster, StepTime, step_time

USABLE = 0.95
"""Of a GPU's memory, the rest being CUDA's and NCCL's own and what the allocator cannot use. An
assumption."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked configuration with its figures."""

    config: Config
    memory: RankMemory
    """Of the fullest rank."""
    time: StepTime

    def fits(self, cluster: Cluster) -> bool:
        """Whether the fullest rank fits into a GPU."""
        return self.memory.total <= USABLE * cluster.gpu.memory


def plan(config: Config, cluster: Cluster, padded_vocab_size: int) -> Plan:
    """Of a configuration that `check_config` accepts for the cluster's GPUs."""
    return Plan(
        config=config,
        memory=fullest(rank_memories(config, cluster.num_gpus, padded_vocab_size)),
        time=step_time(config, cluster, padded_vocab_size),
    )


def largest_memory(config: Config, cluster: Cluster, padded_vocab_size: int) -> int:
    """The most half-keys, a multiple of 32, with which the configuration fits; 0: none."""

    def fits(half_keys: int) -> bool:
        memory = dataclasses.replace(config.memory, num_half_keys=half_keys)
        changed = dataclasses.replace(config, memory=memory)
        found = fullest(rank_memories(changed, cluster.num_gpus, padded_vocab_size))
        return found.total <= USABLE * cluster.gpu.memory

    low, high = 0, MAX_HALF_KEYS // 32
    while low < high:
        middle = (low + high + 1) // 2
        if fits(32 * middle):
            low = middle
        else:
            high = middle - 1
    return 32 * low if 32 * low >= config.memory.top_k else 0


MAX_HALF_KEYS = 46340
"""Whose square still is an int32, as slots' numbers are."""
