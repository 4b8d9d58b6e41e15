"""Share of slots read and divergence from uniform, by hand."""

import math

import pytest
import torch

from megatron_memory.memory.routing import Route
from megatron_memory.memory.usage import SlotUsage, usage_figures
from tests.distributed import run_ranks
from tests.tiny import tiny_batch, tiny_config, tiny_model


def make_route(slots: list[int], weights: list[float], dtype=torch.int32) -> Route:
    """One token and one head."""
    indices = torch.tensor(slots, dtype=dtype).view(1, 1, -1)
    tensor = torch.tensor(weights).view(1, 1, -1)
    return Route(indices=indices, scores=tensor, weights=tensor)


@pytest.mark.parametrize(
    ("sums", "share", "kl"),
    [
        ([1.0, 1, 1, 1], 1.0, 0.0),
        ([7.0, 7, 7, 7], 1.0, 0.0),
        ([0.0, 5, 0, 0], 0.25, math.log(4)),
        ([1.0, 1, 0, 0], 0.5, math.log(2)),
        # Shares 3/4 and 1/4: log 4 - H(3/4, 1/4).
        ([3.0, 0, 1, 0], 0.5, 0.75 * math.log(3)),
        ([1e-20, 0, 0, 1e-20], 0.5, math.log(2)),
        ([0.0, 0, 0, 0], 0.0, 0.0),
        ([2.0], 1.0, 0.0),
    ],
)
def test_figures(sums: list[float], share: float, kl: float):
    figures = usage_figures(torch.tensor(sums))
    assert figures.share_of_slots_read == share
    assert figures.kl_to_uniform == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_routes_add_up(dtype):
    usage = SlotUsage(8, torch.device("cpu"))
    usage.record(make_route([3, 3, 0], [0.25, 0.5, 0.25], dtype))
    usage.record(make_route([0, 7, 3], [0.75, 1.0, 0.25], dtype))
    assert usage.weight_sums.tolist() == [1, 0, 0, 1, 0, 0, 0, 1]
    figures = usage.figures(None)
    assert figures.share_of_slots_read == 3 / 8
    assert figures.kl_to_uniform == pytest.approx(math.log(8 / 3), abs=1e-6)


def test_counting_keeps_no_graph():
    usage = SlotUsage(4, torch.device("cpu"))
    weights = torch.ones(1, 1, 2, requires_grad=True)
    usage.record(Route(indices=torch.zeros(1, 1, 2).int(), scores=weights, weights=weights * 2))
    assert not usage.weight_sums.requires_grad


def _count_two_slots() -> tuple:
    rank = torch.distributed.get_rank()
    usage = SlotUsage(8, torch.device("cpu"))
    usage.record(make_route([0, 1 + rank], [0.5, 0.5]))
    return usage.figures(torch.distributed.group.WORLD)


@pytest.mark.distributed
def test_figures_are_over_all_ranks():
    first, second = run_ranks(_count_two_slots, 2)
    assert first == second
    assert first.share_of_slots_read == 3 / 8
    # Shares 1/2, 1/4, 1/4: an entropy of 3/2 log 2.
    assert first.kl_to_uniform == pytest.approx(math.log(8) - 1.5 * math.log(2), abs=1e-6)


def test_layers_count_while_they_have_a_counter(one_rank):
    config = tiny_config("memory+")
    model = tiny_model(config)
    layer, other = model.memory_layers()
    batch = tiny_batch()
    layer.usage = usage = SlotUsage(config.memory.num_values, torch.device("cpu"))
    model(**batch)
    # Each head's weights sum to one for each token.
    num_heads = config.memory.num_heads
    assert usage.weight_sums.sum().item() == pytest.approx(num_heads * batch["labels"].numel())
    before = usage.weight_sums.clone()
    layer.usage = None
    model(**batch)
    assert torch.equal(usage.weight_sums, before)
    assert other.usage is None
