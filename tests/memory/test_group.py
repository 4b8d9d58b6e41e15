"""What a memory layer sends to its data-parallel neighbours, counted: docs/architecture.md's
table."""

import pytest
import torch
from megatron.core.tensor_parallel import mappings

from megatron_memory.memory.group import MemoryGroup
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from tests.distributed import run_ranks
from tests.tiny import SEQUENCE, tiny_config, tiny_model

TP, M, SEQUENCES, HIDDEN, ROWS = 2, 2, 3, 32, 2 * 4
TOKENS = SEQUENCE * SEQUENCES


class _Count:
    """Bytes of a collective's smaller tensor, by the group's name and the collective's."""

    def __init__(self, group: MemoryGroup):
        self.names = {group.tp: "tp", group.neighbours: "neighbours", group.whole: "whole"}
        self.bytes: dict[str, int] = {}

    def wrap(self, module, attribute: str, name: str) -> None:
        collective = getattr(module, attribute)

        def counted(*tensors, group, **options):
            smallest = min(tensor.numel() * tensor.element_size() for tensor in tensors)
            key = f"{self.names[group]} {name}"
            self.bytes[key] = self.bytes.get(key, 0) + smallest
            return collective(*tensors, group=group, **options)

        setattr(module, attribute, counted)


def count_sent(variant: str, sequence_parallel: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Of one layer's forward and backward pass on this rank."""
    parallel = {"tensor_model_parallel_size": TP, "sequence_parallel": sequence_parallel}
    config = tiny_config(variant, parallel, memory={"parallel_size": M})
    initialize_distributed(config, select_backend("cpu"))
    layer = tiny_model(config).memory_layers()[0]
    count = _Count(layer.group)
    count.wrap(mappings, "dist_all_gather_func", "gather")
    count.wrap(mappings, "dist_reduce_scatter_func", "reduce-scatter")
    count.wrap(torch.distributed, "all_to_all_single", "all-to-all")
    count.wrap(torch.distributed, "all_reduce", "all-reduce")
    length = SEQUENCE // TP if sequence_parallel else SEQUENCE
    output, _ = layer(torch.randn(length, SEQUENCES, HIDDEN, requires_grad=True))
    forward, count.bytes = count.bytes, {}
    output.square().sum().backward()
    return forward, count.bytes


def _to_neighbours(sent: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sent.items() if not name.startswith("tp")}


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("variant", ["pkm", "memory+", "peer"])
def test_bytes_to_neighbours(variant: str, sequence_parallel: bool):
    own_tokens = TOKENS // TP if sequence_parallel else TOKENS
    y = TOKENS * HIDDEN // TP * 4
    exchanged = {"neighbours all-to-all": y * (2 if variant == "peer" else 1)}
    if variant == "peer":
        exchanged["whole all-reduce"] = M * TOKENS * ROWS * 4
    for forward, backward in run_ranks(count_sent, TP * M, variant, sequence_parallel):
        gathered = {"neighbours gather": own_tokens * ROWS * 8}
        assert _to_neighbours(forward) == gathered | exchanged
        scattered = {"neighbours reduce-scatter": own_tokens * ROWS * 4}
        assert _to_neighbours(backward) == scattered | exchanged
