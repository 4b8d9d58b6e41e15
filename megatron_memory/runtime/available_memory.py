"""How much memory a rank may take."""

import os

import psutil
import torch
from megatron.core import parallel_state

from megatron_memory.runtime.backend import Backend

CPU_MARGIN = 1.5
"""A CPU's memory counts so many times: it may swap, and other programs may end."""


def available_bytes(backend: Backend) -> list[int]:
    """For the fullest rank of each pipeline rank, the same on all ranks; a collective call.

    On GPUs what is free of the rank's own. On the CPU a share of what the machine has left,
    generously: as if the other pipeline ranks on it, which may need much less, needed nothing.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if backend.is_cuda:
        free = torch.cuda.mem_get_info(backend.device)[0]
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(torch.distributed.get_world_size())))
        sharing = max(1, ranks // pipeline.size())
        free = int(CPU_MARGIN * psutil.virtual_memory().available / sharing)
    least = torch.full((pipeline.size(),), 2**62, dtype=torch.int64, device=backend.device)
    least[pipeline.rank()] = free
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return least.tolist()
