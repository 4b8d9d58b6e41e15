"""Three training steps on any layout, and how they are compared with one rank's.

fp32; ranks sum in another order. The first gradients agree within 1e-5 of a tensor's largest entry,
as single layers do (tests/memory/test_golden_module.py); the later ones within 1e-4, for by then
the weights differ by rounding too. Adam divides by the root of the second moment, so that an entry
whose gradient is itself rounding noise could move by the learning rate in either direction; eps
1e-4, far above the noise (about 1e-8) and below the gradients that matter, keeps weights
comparable, to 3e-5.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_memory.config import Config
from megatron_memory.memory import table
from megatron_memory.model.full_weights import load_stage_weights
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from megatron_memory.training.gradients import finalize_gradients
from megatron_memory.training.setup import TrainingSetup, build_training_setup
from megatron_memory.training.step import Batch, evaluate_loss, train_step
from megatron_memory.training.wrapping import unwrap
from tests.full_tensors import assemble, local_gradients, local_weights, of_chunks
from tests.tiny import SEQUENCE, VOCAB

STEPS = 3
MOST_MICROBATCHES = 6 * (STEPS + 1)
GRADIENT_TOLERANCES, WEIGHT_TOLERANCE = (1e-5, 1e-4, 1e-4), 3e-5


MakeBatches = Callable[[int, int], Iterator[Batch]]
"""From a data-parallel rank and their number to its microbatches."""


def tiny_batches(data_parallel_rank: int, data_parallel_size: int) -> Iterator[Batch]:
    """Microbatches of random tokens of a data-parallel rank, for `train`."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (MOST_MICROBATCHES, 2, SEQUENCE + 1), generator=generator)
    for micro_batch in tokens[data_parallel_rank::data_parallel_size]:
        yield {
            "tokens": micro_batch[:, :-1].contiguous(),
            "labels": micro_batch[:, 1:].contiguous(),
            "loss_mask": torch.ones(2, SEQUENCE),
            "position_ids": torch.arange(SEQUENCE).expand(2, -1),
        }


def train(
    config: Config, start: dict[str, Tensor] | None = None, batches: MakeBatches = tiny_batches
) -> dict:
    """Three steps and an evaluation on this rank; what it saw.

    `start`: whole weights to begin with. Pipeline stages need them, for they draw other random
    numbers than one rank.
    `batches`: makes this rank's microbatches.
    """
    backend = select_backend("cpu")
    initialize_distributed(config, backend)
    setup = build_training_setup(config, backend, VOCAB)
    if start is not None:
        _load(setup, start)
    seen = {
        "start": of_chunks(setup.model, local_weights),
        "gradients": [],
        "losses": [],
        "norms": [],
    }

    def finalize(*args, **kwargs):
        finalize_gradients(*args, **kwargs)
        for chunk in setup.model:
            _complete_gradients(chunk)
        seen["gradients"].append(of_chunks(setup.model, local_gradients))

    setup.transformer_config.finalize_model_grads_func = finalize
    size = parallel_state.get_data_parallel_world_size()
    microbatches = batches(parallel_state.get_data_parallel_rank(), size)
    number = config.num_microbatches(torch.distributed.get_world_size())
    for _ in range(STEPS):
        result = train_step(setup, microbatches, number)
        seen["losses"].append(result.loss)
        seen["norms"].append((result.grad_norm, result.value_grad_norm))
    # The evaluation waits for the gathering of weights that may still be under way.
    seen["losses"].append(evaluate_loss(setup, microbatches, number))
    seen["end"] = of_chunks(setup.model, local_weights)
    return seen


def _load(setup: TrainingSetup, start: dict[str, Tensor]) -> None:
    for chunk in setup.model:
        load_stage_weights(unwrap(chunk), start)
    setup.optimizer.reload_model_params()


def train_chunked(config: Config) -> dict:
    """`train` with the value tables in chunks of 20 rows of 32 columns: 20, 20, 20 and 4 rows."""
    table.MAX_CHUNK_ELEMENTS = 20 * 32
    return train(config)


def _complete_gradients(ddp) -> None:
    """The distributed optimizer leaves each rank its shard of the sums; bring the others here."""
    if not ddp.ddp_config.use_distributed_optimizer:
        return
    for buffers, group in (
        (ddp.buffers, parallel_state.get_data_parallel_group(with_context_parallel=True)),
        (ddp.expert_parallel_buffers, parallel_state.get_expert_data_parallel_group()),
    ):
        for buffer in buffers:
            for bucket in buffer.buckets:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)


def assert_equal_runs(ranks: list[dict], reference: dict) -> None:
    """Every figure of a parallel run against one rank's."""
    for seen in ranks:
        assert seen["losses"] == pytest.approx(reference["losses"], abs=1e-5)
        for ours, theirs in zip(seen["norms"], reference["norms"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
    assert_close(ranks, reference, "start", 0.0)
    assert_close(ranks, reference, "end", WEIGHT_TOLERANCE)
    for step, tolerance in enumerate(GRADIENT_TOLERANCES):
        ours = assemble([seen["gradients"][step] for seen in ranks])
        theirs = assemble([reference["gradients"][step]])
        _assert_tensors_close(f"gradient {step}", ours, theirs, tolerance)


def assert_close(ranks: list[dict], reference: dict, what: str, tolerance: float) -> None:
    """Weights, "start" or "end", of all ranks against one rank's."""
    ours, theirs = assemble([seen[what] for seen in ranks]), assemble([reference[what]])
    _assert_tensors_close(what, ours, theirs, tolerance)


def _assert_tensors_close(what: str, ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    # A gate's bias is one number, a sum over all tokens that nearly cancels: no smaller scale than
    # 1% of the largest entry of all.
    floor = 0.01 * max(tensor.abs().max() for tensor in theirs.values())
    for name, tensor in theirs.items():
        error = (ours[name] - tensor).abs().max() / tensor.abs().max().clamp(min=floor)
        assert error <= tolerance, f"{what}: {name} is off by {error:.2e} of its largest entry"
