"""Batches of a dataset, in an order that depends on nothing but the number of samples consumed."""

import atexit
import functools
import mmap
import os
import signal
import sys
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from megatron_memory.exceptions import DataError

_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def batch_iterator(
    dataset: Dataset,
    *,
    consumed_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int,
) -> Iterator[dict[str, torch.Tensor]]:
    """Microbatches of this rank, from where the run stands to the end of the dataset.

    Microbatch m holds the samples from
    `consumed_samples + (m * data_parallel_size + data_parallel_rank) * micro_batch_size` on. So a
    global batch holds the same samples for every data-parallel size, and a run that goes on after
    `consumed_samples` reads what it would have read without the stop. Samples at the end that do
    not fill a microbatch on every rank are left out.

    Tensor-parallel ranks of one data-parallel rank each read the same samples from the files
    themselves: nothing has to be sent or kept in step between them.

    Draws nothing from torch's global random state.

    Args:
        dataset: of Datasets.
        consumed_samples: read by all ranks together so far.
        num_workers: processes that read ahead; 0: the calling process reads.

    Yields:
        `tokens`, `labels`, `position_ids` [micro_batch_size, seq_length] int64 and `loss_mask`
        [micro_batch_size, seq_length] float32, on the CPU (pinned where there is a GPU);
        `attention_mask` [micro_batch_size, 1, seq_length, seq_length] bool where the dataset makes
        one.

    Raises:
        DataError: here, if no whole batch is left; while iterating, for a token id that the model
            does not have.
    """
    sampler = MicrobatchSampler(
        len(dataset),  # type: ignore[arg-type]
        consumed_samples=consumed_samples,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=data_parallel_rank,
        data_parallel_size=data_parallel_size,
    )
    if len(sampler) == 0:
        raise DataError(
            f"no batch is left: {consumed_samples} of the dataset's {sampler.num_samples} samples "
            f"are consumed, and a batch takes {micro_batch_size} (--micro-batch-size) on each of "
            f"{data_parallel_size} ranks. Raise --train-iters, which decides how many samples are "
            "built, or end the run here"
        )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        # Without its own generator the loader draws a seed from the global one, and a run that is
        # stopped and resumed would see other dropout masks than one that is not.
        generator=torch.Generator(),
        multiprocessing_context="fork" if num_workers and sys.platform == "linux" else None,
        worker_init_fn=functools.partial(_shield_worker, _shutdown_flag()) if num_workers else None,
    )
    return iter(loader)


class MicrobatchSampler(Sampler[list[int]]):
    """Sample numbers of each microbatch of one data-parallel rank; see `batch_iterator`."""

    def __init__(
        self,
        num_samples: int,
        *,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        assert consumed_samples >= 0 and micro_batch_size > 0, "counts of samples"
        assert 0 <= data_parallel_rank < data_parallel_size, "rank within its group"
        self.num_samples = num_samples
        self.stride = micro_batch_size * data_parallel_size
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.offset = data_parallel_rank * micro_batch_size

    def __len__(self) -> int:
        return max(0, self.num_samples - self.consumed_samples) // self.stride

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.consumed_samples + self.offset
        for first in range(begin, begin + len(self) * self.stride, self.stride):
            yield list(range(first, first + self.micro_batch_size))


def _collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    kept = [{key: sample[key] for key in _KEYS if key in sample} for sample in samples]
    return default_collate(kept)


@functools.cache
def _shutdown_flag() -> mmap.mmap:
    """One byte that forked workers share: 1 once the main process is on its way out."""
    flag = mmap.mmap(-1, 1)

    def raise_flag() -> None:
        flag[0] = 1

    # Registered after multiprocessing's own exit handler, so it runs before that one.
    atexit.register(raise_flag)
    return flag


def _shield_worker(shutting_down: mmap.mmap, worker_id: int) -> None:
    """Keep a worker alive through signals that mean the training process.

    Launchers and schedulers send SIGTERM or SIGUSR1 to every process of a job. The training process
    then finishes its step, for which it still needs its workers; it ends them itself.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if shutting_down[0] else None)
