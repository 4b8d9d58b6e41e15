"""Processes, Megatron's parallel groups, and the seeds of every rank."""

import datetime
import os
import random

import numpy as np
import torch

from megatron_memory.config import Config
from megatron_memory.config.pipeline import num_chunks
from megatron_memory.runtime.backend import Backend


def world_size() -> int:
    """Processes of this run, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize_distributed(config: Config, backend: Backend) -> None:
    """Join the run's processes, form Megatron's groups, seed the generators.

    Needs no torchrun for one process.
    """
    if backend.is_cuda:
        torch.cuda.set_device(backend.device)
    if not torch.distributed.is_initialized():
        _join(config, backend)
    from megatron.core import parallel_state

    parallel, chunks = config.parallel, num_chunks(config.stages)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=config.expert_group_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    seed_everything(config.training.seed)


def _join(config: Config, backend: Backend) -> None:
    timeout = datetime.timedelta(minutes=config.parallel.distributed_timeout_minutes)
    options: dict = dict(backend=backend.distributed, timeout=timeout)
    if "RANK" not in os.environ:
        options.update(store=torch.distributed.HashStore(), rank=0, world_size=1)
    if backend.distributed == "nccl":
        options["device_id"] = backend.device
    torch.distributed.init_process_group(**options)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and Megatron's tracker of generators, before weights are drawn.

    Data-parallel ranks draw alike, so that they begin with the same weights; steps are seeded by
    `seed_step`. Ranks of one tensor-parallel group share the default generator and differ in the
    tracker's; pipeline stages differ in both, which megatron-core leaves to its caller.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def seed_step(seed: int, step: int) -> None:
    """Seed all that is drawn in a training step: random slots and every dropout mask.

    Data- and context-parallel ranks have other tokens and draw other numbers, which megatron-core
    leaves to its caller. Tensor-parallel ranks draw alike what they compute alike, and else, from
    the tracker, their own. A step's draws depend on nothing before it, so that a run that starts
    again, in this layout or in another, draws what it would have drawn.

    Args:
        seed: of the run.
        step: optimizer steps taken before.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name

    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    tracker = get_cuda_rng_tracker()
    names = sorted(tracker.get_states())
    tracker.reset()
    for number, name in enumerate(names, 1):
        is_common = name == get_data_parallel_rng_tracker_name()
        tracker.add(name, _mixed(seed, step, *place, number, 0 if is_common else tensor_rank))
    torch.manual_seed(_mixed(seed, step, *place, 0, 0))


def _mixed(*numbers: int) -> int:
    """One seed of 32 bits: torch's CPU generator heeds no others. No sum, for seed 1 on rank 0
    would be seed 0 on rank 1."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def pipeline_subgroup(
    ranks: tuple[int, ...], timeout_minutes: int
) -> torch.distributed.ProcessGroup | None:
    """The group of these pipeline ranks of this rank's pipeline; None where it is not among them.

    A collective call of the whole world: every pipeline makes its own.
    """
    from megatron.core import parallel_state

    pipeline = parallel_state.get_pipeline_model_parallel_group()
    mine = torch.distributed.get_process_group_ranks(pipeline)
    pipelines: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(pipelines, tuple(mine))
    found = None
    for members in sorted(set(pipelines)):
        group = torch.distributed.new_group(
            [members[rank] for rank in ranks],
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
        if members == tuple(mine) and pipeline.rank() in ranks:
            found = group
    return found


def shutdown_distributed() -> None:
    """Leave Megatron's groups and the run."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
