"""The memory layer on Triton's kernels against torch's operators: output and every gradient.

On the CPU the kernels run in Triton's interpreter; tests/gpu runs these on a GPU.
"""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_memory.memory import table as table_module
from memory_kernels.choice import kernels_in_use, use_kernels
from tests.devices import TEST_DEVICE
from tests.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_rank")

# fp32 sums of up to 32 terms in another order.
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _restore_choice():
    before = kernels_in_use()
    yield
    use_kernels(before)


def forward_and_backward(kernels: str, config) -> dict[str, torch.Tensor]:
    """The first memory layer's output, and the gradients of its input and of all it is made of."""
    use_kernels(kernels)
    model = tiny_model(config)
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    ddp.zero_grad_buffer()
    layer = model.memory_layers()[0]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 2, 32, generator=generator).to(TEST_DEVICE).requires_grad_()
    output, bias = layer(x)
    output = output if bias is None else output + bias
    output.square().sum().backward()
    results = {"output": output.detach(), "x": x.grad}
    for name, parameter in (*layer.named_parameters(), *layer.tables.named_parameters()):
        results[name] = parameter.main_grad.clone()
    return results


@pytest.mark.parametrize("elements", [2**28, 10 * 32], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("variant", ["pkm", "memory+", "peer"])
def test_triton_equals_torch(variant: str, elements: int, monkeypatch):
    monkeypatch.setattr(table_module, "MAX_CHUNK_ELEMENTS", elements)
    config = tiny_config(variant, memory={"gated": True, "qk_norm": True})
    theirs = forward_and_backward("torch", config)
    ours = forward_and_backward("triton", config)
    assert len([name for name in ours if "weight" in name]) > 2
    for name, tensor in theirs.items():
        error = (ours[name] - tensor).abs().max() / tensor.abs().max()
        assert error < TOLERANCE, name
