"""Which microbatches' activations a pipeline rank holds at once, in Megatron's schedules."""

from collections.abc import Sequence


def most_held(
    sizes: Sequence[int], *, rank: int, num_ranks: int, num_microbatches: int
) -> tuple[int, tuple[int, ...]]:
    """The most bytes of activations held at once, and of how many microbatches in each chunk.

    One forward pass follows one backward pass after a warm-up (1F1B); with several chunks they are
    computed in turn, `num_ranks` microbatches each (`forward_backward_pipelining_with_interleaving`
    in megatron-core's schedules.py).

    Args:
        sizes: bytes that a microbatch keeps in each chunk of the rank.
        rank: pipeline rank.
        num_ranks: pipeline ranks.
        num_microbatches: of a step.
    """
    num_chunks = len(sizes)
    # What repeats needs no second look.
    shown = min(num_microbatches, 4 * num_ranks)
    order = _order(num_chunks, num_ranks, shown)
    if num_chunks == 1:
        warmup = num_ranks - rank - 1
    else:
        warmup = 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks
    held = [0] * num_chunks
    most, most_counts = 0, (0,) * num_chunks
    for i, chunk in enumerate(order):
        held[chunk] += 1
        size = sum(count * each for count, each in zip(held, sizes, strict=True))
        if size > most:
            most, most_counts = size, tuple(held)
        if i >= warmup:
            held[num_chunks - 1 - order[i - warmup]] -= 1
    return most, most_counts


def _order(num_chunks: int, num_ranks: int, num_microbatches: int) -> list[int]:
    """The chunks of forward passes in turn; backward passes take the mirrored chunks."""
    order: list[int] = []
    for first in range(0, num_microbatches, num_ranks):
        group = min(num_ranks, num_microbatches - first)
        for chunk in range(num_chunks):
            order += [chunk] * group
    return order


def bubble(num_ranks: int, num_chunks: int, num_microbatches: int) -> float:
    """Idle time of a pipeline, as a share of the time it computes."""
    return (num_ranks - 1) / (num_chunks * num_microbatches)
