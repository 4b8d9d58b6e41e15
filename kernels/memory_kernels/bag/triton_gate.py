"""Backward of the bag's gate, y = sums * silu(gate): both gradients in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memory_kernels.launch import Launch, ceil_div

_ELEMENTS_A_PROGRAM = 1024


@triton.jit
def gate_gradients_kernel(
    grad_sums, grad_gate, grad_output, sums, gate, num_elements, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = at < num_elements
    grad = tl.load(grad_output + at, mask=held, other=0.0).to(tl.float32)
    s = tl.load(sums + at, mask=held, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=held, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = g * sigmoid
    tl.store(grad_sums + at, (grad * silu).to(grad_sums.dtype.element_ty), mask=held)
    slope = grad * s * (sigmoid + silu * (1 - sigmoid))
    tl.store(grad_gate + at, slope.to(grad_gate.dtype.element_ty), mask=held)


def plan_gate_gradients(
    grad_sums: Tensor, grad_gate: Tensor, grad_output: Tensor, sums: Tensor, gate: Tensor
) -> Launch:
    """grad_sums and grad_gate from contiguous operands, [T, D] each, computed in fp32."""
    return Launch(
        kernel=gate_gradients_kernel,
        grid=(ceil_div(sums.numel(), _ELEMENTS_A_PROGRAM),),
        arguments=dict(
            grad_sums=grad_sums,
            grad_gate=grad_gate,
            grad_output=grad_output,
            sums=sums,
            gate=gate,
            num_elements=sums.numel(),
            BLOCK=_ELEMENTS_A_PROGRAM,
        ),
    )


def gate_gradients(grad_output: Tensor, sums: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for sums and gate, each in its own dtype; see `gate_backward` in operators.py."""
    grad_output, sums, gate = (each.contiguous() for each in (grad_output, sums, gate))
    grad_sums, grad_gate = torch.empty_like(sums), torch.empty_like(gate)
    plan_gate_gradients(grad_sums, grad_gate, grad_output, sums, gate).run()
    return grad_sums, grad_gate
