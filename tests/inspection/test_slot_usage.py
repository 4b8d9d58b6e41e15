"""Figures of slots' reads, by hand."""

import math

import pytest
import torch

from megatron_memory.inspection.slot_usage import layer_usage


def test_figures():
    # Mean 1: 300 never, one with a quarter, 698 with one, one with 301.75.
    sums = torch.ones(1000, dtype=torch.float64)
    sums[:300] = 0
    sums[300], sums[301] = 0.25, 301.75
    found = layer_usage(sums)
    assert (found.num_slots, found.num_never_read) == (1000, 300)
    # The ten largest: 301.75 and nine ones.
    assert found.share_of_top_percent == pytest.approx(310.75 / 1000)
    assert found.histogram == pytest.approx(
        {
            "never": 0.3,
            "below 1/16": 0,
            "1/16 to 1/4": 0,
            "1/4 to 1": 0.001,
            "1 to 4": 0.698,
            "4 to 16": 0,
            "16 and more": 0.001,
        }
    )
    kl = (0.25 * math.log(0.25) + 301.75 * math.log(301.75)) / 1000
    assert found.kl_to_uniform == pytest.approx(kl)


def test_even_few_and_none():
    even = layer_usage(torch.full((64,), 3.5))
    assert (even.num_never_read, even.kl_to_uniform) == (0, pytest.approx(0, abs=1e-9))
    assert even.share_of_top_percent == pytest.approx(1 / 64)
    assert even.histogram["1 to 4"] == 1
    none = layer_usage(torch.zeros(64))
    assert (none.num_never_read, none.share_of_top_percent, none.kl_to_uniform) == (64, 0, 0)
    assert none.histogram["never"] == 1
