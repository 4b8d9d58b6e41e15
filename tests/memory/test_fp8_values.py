"""Values read in fp8: always those of the present weights, and never saved."""

import pytest
import torch

from megatron_memory.config import PrecisionConfig
from megatron_memory.memory import table as table_module
from megatron_memory.memory.table import ValueTable
from megatron_memory.planning.parameters import weights
from megatron_memory.planning.states import shadow_bytes
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from megatron_memory.training.setup import build_training_setup
from megatron_memory.training.step import evaluate_loss, train_step
from megatron_memory.training.wrapping import unwrap
from memory_kernels import Fp8Shadow, weighted_bag
from memory_kernels.shadow import dequantize_rows
from tests.distributed import run_ranks
from tests.parallel.runs import tiny_batches
from tests.tiny import VOCAB, tiny_batch, tiny_config, tiny_model

STEPS = 3


def fp8_config(variant: str = "memory+", parallel: dict | None = None, **memory):
    precision = PrecisionConfig(bf16=True)
    memory = {"fp8_values": True} | memory
    # Without a warm-up the first step moves the weights, too.
    optimizer = {"lr_warmup_iters": 0}
    return tiny_config(variant, parallel, memory=memory, precision=precision, optimizer=optimizer)


def assert_shadow_is_of_the_weights(table: ValueTable) -> None:
    assert table.shadow is not None
    wanted = Fp8Shadow.of([chunk.detach() for chunk in table.chunks])
    for ours, theirs in zip(table.shadow.tensors(), wanted.tensors(), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def dequantized(table: ValueTable) -> torch.Tensor:
    """[S, D] fp32: what is read."""
    *values, scales = table.shadow.tensors()
    return dequantize_rows(
        torch.cat([chunk.view(torch.uint8) for chunk in values]).view(torch.float8_e4m3fn), scales
    )


@pytest.fixture(params=[2**28, 10 * 32], ids=["one chunk", "chunks"])
def chunking(request, monkeypatch):
    monkeypatch.setattr(table_module, "MAX_CHUNK_ELEMENTS", request.param)


@pytest.mark.usefixtures("one_rank", "chunking")
def test_layers_read_the_quantised_values():
    model = tiny_model(fp8_config())
    (table,) = model.memory.tables()
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(64, (9, 8), generator=generator)
    weights, gate = (torch.randn(9, n, generator=generator).bfloat16() for n in (8, 32))
    read = table(weights)
    y = weighted_bag(read.chunks, indices, read.operand, gate, **read.options())
    assert_shadow_is_of_the_weights(table)
    stored = torch.cat([chunk.detach() for chunk in table.chunks]).float()
    results = []
    for rows in (dequantized(table), stored):
        sums = (weights.float()[:, :, None] * rows[indices]).sum(dim=1)
        results.append(sums * torch.nn.functional.silu(gate.float()))
    # bf16 keeps eight bits, of y and of the sums before the gate; the values' fp8 only four.
    errors = [(y - exact).abs().max() / exact.abs().max() for exact in results]
    assert errors[0] < 2**-7 < errors[1]


@pytest.mark.usefixtures("one_rank", "chunking")
def test_a_step_is_followed_by_new_shadows():
    config = fp8_config()
    setup = build_training_setup(config, select_backend("cpu"), VOCAB)
    (table,) = unwrap(setup.model[0]).memory.tables()
    assert table.shadow is None
    losses = []
    for _ in range(STEPS):
        result = train_step(setup, tiny_batches(0, 1), 4)  # the same ones: something to learn
        losses.append(result.loss)
        assert result.value_grad_norm > 0
        read = dequantized(table)
        evaluate_loss(setup, iter([next(tiny_batches(0, 1))]), 1)
        assert_shadow_is_of_the_weights(table)
        assert not torch.equal(read, dequantized(table))
    assert losses[-1] < losses[0]


@pytest.mark.usefixtures("one_rank")
def test_shadows_are_not_written_anew_at_every_read(monkeypatch):
    written = []
    write = Fp8Shadow.write
    monkeypatch.setattr(Fp8Shadow, "write", lambda *args: written.append(1) or write(*args))
    setup = build_training_setup(fp8_config(), select_backend("cpu"), VOCAB)
    train_step(setup, tiny_batches(0, 1), 4)  # two layers, four microbatches
    assert len(written) == 1
    train_step(setup, tiny_batches(0, 1), 4)
    assert len(written) == 2


@pytest.mark.usefixtures("one_rank")
def test_loading_weights_renews_the_shadow():
    model, other = tiny_model(fp8_config()), tiny_model(fp8_config(), seed=1)
    with torch.no_grad():
        other.memory.tables()[0].weight.mul_(-3)
    model(**tiny_batch())
    model.load_state_dict(other.state_dict())
    model(**tiny_batch())
    (table,) = model.memory.tables()
    assert_shadow_is_of_the_weights(table)
    assert torch.equal(table.weight, other.memory.tables()[0].weight)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("variant", ["memory+", "peer"])
def test_shadows_are_counted_and_not_saved(variant: str):
    config = fp8_config(variant, share_scope="layer")
    model = tiny_model(config)
    names = set(model.state_dict())
    model(**tiny_batch())
    assert set(model.state_dict()) == names
    assert not [name for name, _ in model.named_buffers() if "memory." in name]
    tensors = [tensor for table in model.memory.tables() for tensor in table.shadow.tensors()]
    real = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert shadow_bytes(config, weights(config, VOCAB)) == real
    plain = tiny_config(variant)
    assert shadow_bytes(plain, weights(plain, VOCAB)) == 0


def _train(config) -> list[float]:
    backend = select_backend("cpu")
    initialize_distributed(config, backend)
    setup = build_training_setup(config, backend, VOCAB)
    group = torch.distributed.get_rank()
    batches = tiny_batches(group, 2)
    losses = [train_step(setup, batches, 2).loss for _ in range(STEPS)]
    losses.append(evaluate_loss(setup, batches, 2))
    (table,) = unwrap(setup.model[0]).memory.tables()
    assert_shadow_is_of_the_weights(table)
    return losses


def test_shadows_wait_for_the_overlapped_gather_of_the_weights():
    """Each rank updates a part of the weights; the others' arrive during the next forward pass."""
    distributed = {"use_distributed_optimizer": True}
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    plain = run_ranks(_train, 2, fp8_config(parallel=distributed))
    assert run_ranks(_train, 2, fp8_config(parallel=distributed | overlap)) == plain


def _train_tensor_parallel(config) -> list[float]:
    backend = select_backend("cpu")
    initialize_distributed(config, backend)
    setup = build_training_setup(config, backend, VOCAB)
    batches = tiny_batches(0, 1)
    return [train_step(setup, batches, 4).loss for _ in range(STEPS)]


def test_tensor_parallel_follows_one_rank():
    """The scale is of a rank's part of a row, so that rounding differs a little."""
    one = run_ranks(_train_tensor_parallel, 1, fp8_config())[0]
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    for losses in run_ranks(_train_tensor_parallel, 2, fp8_config(parallel=parallel)):
        assert losses == pytest.approx(one, abs=2e-2)
