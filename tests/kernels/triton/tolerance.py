"""How far a kernel's result may be from the exact one."""

import torch
from torch import Tensor


def assert_close_to_exact(ours: Tensor, exact: Tensor) -> None:
    """ours, summed in fp32 and rounded once to its dtype, against the value in fp64.

    Sums of some hundred terms of order one are off by 1e-5 of the largest entry at most. Triton's
    interpreter cuts fp32 down to bf16 where a GPU rounds to the nearest: off by one unit in the
    last place instead of half a one, so one unit is allowed.
    """
    assert ours.shape == exact.shape
    if ours.numel() == 0:
        return
    unit = 0.0 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps
    exact = exact.detach()
    bound = 1e-5 * exact.abs().max() + unit * exact.abs() + torch.finfo(ours.dtype).tiny
    error = (ours.detach().double() - exact).abs()
    assert (error <= bound).all(), f"off by {error.max():.3e}, of {exact.abs().max():.3e}"
