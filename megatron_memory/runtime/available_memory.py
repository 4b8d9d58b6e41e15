"""How much memory a rank may take."""

import os

import psutil
import torch

from megatron_memory.runtime.backend import Backend

CPU_MARGIN = 1.5
"""A CPU's memory counts so many times: it may swap, and other programs may end."""


def available_bytes(backend: Backend) -> int:
    """For this run's fullest rank, the same on all of them; a collective call.

    On GPUs what is free of the rank's own; on the CPU its share of what the machine has left,
    generously.
    """
    if backend.is_cuda:
        free = torch.cuda.mem_get_info(backend.device)[0]
    else:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(torch.distributed.get_world_size())))
        free = int(CPU_MARGIN * psutil.virtual_memory().available / ranks)
    least = torch.tensor(free, dtype=torch.int64, device=backend.device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return int(least.item())
