"""The memory layers on a GPU: Triton's kernels against torch's operators, in layer and training."""

import pytest
import torch

from megatron_memory.config import PrecisionConfig
from megatron_memory.memory import table as table_module
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed, shutdown_distributed
from megatron_memory.runtime.kernels import choose_kernels
from megatron_memory.training.setup import build_training_setup
from megatron_memory.training.step import evaluate_loss, train_step
from megatron_memory.training.wrapping import unwrap
from tests.devices import TEST_DEVICE, needs_gpu_run
from tests.memory.test_fp8_values import assert_shadow_is_of_the_weights
from tests.memory.test_kernels import forward_and_backward
from tests.tiny import SEQUENCE, VOCAB, one_rank, tiny_config

__all__ = ["one_rank"]

pytestmark = [pytest.mark.gpu, needs_gpu_run, pytest.mark.usefixtures("one_rank", "auto_after")]

STEPS, MICROBATCHES = 4, 4
# fp32 sums in another order; training amplifies them (Adam's eps is above the noise).
LAYER_TOLERANCE, LOSS_TOLERANCE = 1e-4, 1e-4
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS = {
    "ddp": {},
    "ddp-overlap": {"overlap_grad_reduce": True},
    "distopt": {"use_distributed_optimizer": True},
    "distopt-overlap": {"use_distributed_optimizer": True} | OVERLAP,
}
CHUNKINGS = {"one chunk": 2**28, "chunks": 10 * 32}


@pytest.fixture(params=CHUNKINGS)
def chunking(request, monkeypatch):
    monkeypatch.setattr(table_module, "MAX_CHUNK_ELEMENTS", CHUNKINGS[request.param])


@pytest.fixture
def auto_after():
    yield
    choose_kernels("auto", select_backend(TEST_DEVICE))


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("variant", ["pkm", "memory+", "peer"])
def test_layer(variant: str):
    config = tiny_config(variant, memory={"gated": True, "qk_norm": True})
    theirs = forward_and_backward("torch", config)
    ours = forward_and_backward("triton", config)
    again = forward_and_backward("triton", config)
    for name, tensor in theirs.items():
        error = (ours[name] - tensor).abs().max() / tensor.abs().max()
        assert error < LAYER_TOLERANCE, name
        assert torch.equal(ours[name], again[name]), f"{name}: two runs differ"


def train(kernels: str, config):
    """Losses of a few steps on the same batches, and the setup."""
    backend = select_backend(TEST_DEVICE)
    assert ("Triton" in choose_kernels(kernels, backend)) == (kernels == "triton")
    shutdown_distributed()
    initialize_distributed(config, backend)  # the same seeds for every training of a test
    setup = build_training_setup(config, backend, VOCAB)
    losses = [train_step(setup, _batches(), MICROBATCHES).loss for _ in range(STEPS)]
    return losses, setup


def _batches():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (MICROBATCHES, 2, SEQUENCE + 1), generator=generator)
    for micro_batch in tokens:
        yield {
            "tokens": micro_batch[:, :-1].contiguous(),
            "labels": micro_batch[:, 1:].contiguous(),
            "loss_mask": torch.ones(2, SEQUENCE),
            "position_ids": torch.arange(SEQUENCE).expand(2, -1),
        }


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_training(layout: str):
    """The gradient goes to main_grad with and without distributed optimizer and overlap."""
    config = tiny_config("memory+", LAYOUTS[layout])
    theirs, _ = train("torch", tiny_config("memory+"))
    ours, _ = train("triton", config)
    assert ours == pytest.approx(theirs, abs=LOSS_TOLERANCE)
    assert ours[-1] < ours[0]


@pytest.mark.usefixtures("chunking")
@pytest.mark.parametrize("variant", ["memory+", "peer"])
def test_training_in_bf16_with_fp8_values(variant: str):
    """bf16 keeps eight bits: activations differ by some 1e-3 of the loss, and fp8 adds to it."""
    precision = PrecisionConfig(bf16=True)
    memory = {"fp8_values": True}
    parallel = LAYOUTS["distopt-overlap"]
    config = tiny_config(variant, parallel, memory=memory, precision=precision)
    theirs, _ = train("torch", config)
    ours, setup = train("triton", config)
    assert ours == pytest.approx(theirs, abs=3e-2)
    assert ours[-1] < ours[0]
    evaluate_loss(setup, _batches(), 1)  # waits for the weights of the last update
    for table in unwrap(setup.model[0]).memory.tables():
        assert_shadow_is_of_the_weights(table)
