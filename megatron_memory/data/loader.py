"""Batches of a dataset, in an order that depends on nothing but the number of samples consumed."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from megatron_memory.exceptions import DataError

_JOB_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
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
        **_worker_options() if num_workers else {},
    )
    with _signals_held_back():
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


def _worker_options() -> dict[str, Any]:
    if sys.platform != "linux":
        return {}
    # Forked workers share the memory-mapped index.
    return {"multiprocessing_context": "fork", "worker_init_fn": _shield_worker}


def _collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    kept = [{key: sample[key] for key in _KEYS if key in sample} for sample in samples]
    return default_collate(kept)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Workers forked inside inherit the hold, so that no signal reaches one before its shield."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, (*_JOB_SIGNALS, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _shield_worker(worker_id: int) -> None:
    """Keep a worker alive through signals that mean the training process.

    Launchers and schedulers send SIGTERM or SIGUSR1 to every process of a job. The training process
    then finishes its step, for which it still needs its workers; it ends them itself.
    """
    for number in _JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _JOB_SIGNALS)
    # SIGTERM stays blocked, so that this thread alone takes it and sees who sent it.
    threading.Thread(target=_end_at_parents_word, args=(os.getppid(),), daemon=True).start()


def _end_at_parents_word(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
