"""The order that scores are compared in, of every kind of fp32 number."""

import torch
import triton
import triton.language as tl

from memory_kernels.product_key.triton_select import from_ordered, to_ordered
from tests.devices import TEST_DEVICE


@triton.jit
def order_kernel(scores, ordered, back):
    place = tl.arange(0, 8)
    value = to_ordered(tl.load(scores + place))
    tl.store(ordered + place, value)
    tl.store(back + place, from_ordered(value))


def test_order_of_every_kind_of_score():
    infinity, nan = float("inf"), float("nan")
    scores = torch.tensor([-infinity, -2.0, -1e-44, -0.0, 0.0, 3.0, infinity, nan])
    # Either sign of NaN, as a product of infinities may have it.
    for sign in (1.0, -1.0):
        scores[-1] = torch.copysign(scores[-1], torch.tensor(sign))
        ordered = torch.empty(8, dtype=torch.int32, device=TEST_DEVICE)
        back = torch.empty(8, device=TEST_DEVICE)
        order_kernel[(1,)](scores.to(TEST_DEVICE), ordered, back)
        values = ordered.tolist()
        assert values[3] == values[4]
        assert sorted(values) == values
        assert len(set(values)) == 7
        assert values[0] > -(2**31)
        assert values[-1] < 2**31 - 1
        torch.testing.assert_close(back.cpu(), scores, rtol=0, atol=0, equal_nan=True)
