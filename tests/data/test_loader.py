"""The order of batches: the same for every data-parallel size, and across a restart."""

import itertools
import multiprocessing
import os
import signal
import time

import pytest
import torch

from megatron_memory.data.loader import batch_iterator
from megatron_memory.exceptions import DataError


class Numbers(torch.utils.data.Dataset):
    """Sample i holds i everywhere; records nothing else."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict:
        tokens = torch.full((4,), index)
        ones = torch.ones(4)
        positions = torch.arange(4)
        return dict(
            tokens=tokens, labels=tokens + 1, loss_mask=ones, position_ids=positions, dataset_id=0
        )


def read(num_samples: int = 50, **options) -> list[list[int]]:
    """Sample numbers of each microbatch."""
    defaults = dict(
        consumed_samples=0,
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=0,
    )
    batches = batch_iterator(Numbers(num_samples), **{**defaults, **options})
    return [batch["tokens"][:, 0].tolist() for batch in batches]


def merged(data_parallel_size: int, **options) -> list[int]:
    """Samples in the order in which the ranks together read them."""
    ranks = [
        read(data_parallel_rank=rank, data_parallel_size=data_parallel_size, **options)
        for rank in range(data_parallel_size)
    ]
    return [sample for step in zip(*ranks, strict=True) for batch in step for sample in batch]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_has_the_tensors_of_the_contract(num_workers):
    batch = next(
        batch_iterator(
            Numbers(9),
            consumed_samples=3,
            micro_batch_size=3,
            data_parallel_rank=0,
            data_parallel_size=1,
            num_workers=num_workers,
        )
    )
    assert list(batch) == ["tokens", "labels", "loss_mask", "position_ids"]
    assert all(tensor.shape == (3, 4) for tensor in batch.values())
    assert [batch[key].dtype for key in ("tokens", "labels", "position_ids")] == [torch.int64] * 3
    assert batch["loss_mask"].dtype == torch.float32
    assert batch["tokens"][:, 0].tolist() == [3, 4, 5]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("data_parallel_size", [1, 2, 3, 4])
def test_every_data_parallel_size_reads_the_same_order(data_parallel_size, num_workers):
    samples = merged(data_parallel_size, num_samples=48, num_workers=num_workers)
    assert samples == list(range(48))


def test_microbatches_of_two_ranks_interleave():
    assert read(12, data_parallel_rank=0, data_parallel_size=2) == [[0, 1], [4, 5], [8, 9]]
    assert read(12, data_parallel_rank=1, data_parallel_size=2) == [[2, 3], [6, 7], [10, 11]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_going_on_reads_what_would_have_come(num_workers):
    whole = read(num_workers=num_workers)
    for steps in (1, 7, 24):
        assert read(consumed_samples=2 * steps, num_workers=num_workers) == whole[steps:]
    # At another data-parallel size too.
    assert merged(2, consumed_samples=12, num_samples=52) == list(range(12, 52))


def test_a_last_batch_that_is_not_whole_is_left_out():
    assert merged(2, num_samples=15) == list(range(12))
    assert merged(3, num_samples=17, consumed_samples=3) == list(range(3, 15))


@pytest.mark.parametrize("consumed_samples", [9, 10, 11])
def test_nothing_left_is_an_error(consumed_samples):
    message = f"{consumed_samples} of the dataset's 10 samples are consumed.*--train-iters"
    with pytest.raises(DataError, match=message):
        read(10, consumed_samples=consumed_samples)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_random_state_stays(num_workers):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    read(num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


class Refuses(Numbers):
    def __getitem__(self, index: int) -> dict:
        raise DataError("file.bin: token id 70000")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_of_the_data_keep_their_kind(num_workers):
    batches = batch_iterator(
        Refuses(8),
        consumed_samples=0,
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=num_workers,
    )
    with pytest.raises(DataError, match="file.bin: token id 70000"):
        next(batches)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_workers_outlive_signals_to_the_job_but_not_the_job(number):
    """A launcher signals every process of a job; the step in progress still needs its data."""
    fork = multiprocessing.get_context("fork")
    workers, signalled = fork.SimpleQueue(), fork.Event()
    process = fork.Process(target=_read_through_a_signal, args=(workers, signalled))
    process.start()
    pids = workers.get()
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, number)
    signalled.set()
    process.join(60)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0, "it read wrong or did not end"
    deadline = time.monotonic() + 20
    for pid in pids:
        while _is_alive(pid):
            assert time.monotonic() < deadline, "a worker outlives its job"
            time.sleep(0.05)


# What is still referenced when a process ends is not cleaned up by Python before that.
_kept: list = []


def _read_through_a_signal(workers, signalled) -> None:
    batches = batch_iterator(
        Numbers(400),
        consumed_samples=0,
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=2,
    )
    _kept.append(batches)
    first = next(batches)["tokens"][0, 0].item()
    workers.put([worker.pid for worker in multiprocessing.active_children()])
    assert signalled.wait(60)
    rest = [batch["tokens"][0, 0].item() for batch in itertools.islice(batches, 100)]
    assert [first, *rest] == list(range(0, 202, 2))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
