"""What the retrieval's kernels share: an order of scores, and exact selection without sorting.

A candidate is an int64: its score as an int32 of the same order above, the complement of its index
below. Sorting candidates downwards sorts by score, and among equal scores by rising index.
"""

import triton
import triton.language as tl

_LARGEST = tl.constexpr(2147483647)
# Bisection by value finds the border between scores of one scale within a few rounds; scores of
# many scales, which it would take one at a time, are left to bisection by bits.
_ROUNDS_BY_VALUE = tl.constexpr(8)


@triton.jit
def to_ordered(scores):
    """int32 in the order of fp32 scores: zeros of either sign alike, every NaN alike and on top.

    No score gives the smallest int32, which stands for what is not there.
    """
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    bits = tl.where(scores == scores, bits, 0x7FC00000)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered(ordered):
    """The fp32 scores of `to_ordered`."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack_candidates(ordered, index):
    """int64 candidates; index below 2^32."""
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def ordered_of(candidates):
    return (candidates >> 32).to(tl.int32)


@triton.jit
def index_of(candidates):
    """int64."""
    return 0xFFFFFFFF - (candidates & 0xFFFFFFFF)


@triton.jit
def place_best(ordered, is_there, K: tl.constexpr, CAPACITY: tl.constexpr):
    """Places for between K and CAPACITY entries of each row, the K best among them.

    The border between kept and dropped is found by bisection. It may keep CAPACITY entries, so
    that a few rounds end it: what is wanted is a border of that many entries and not the K-th
    score. Only where more entries than that are equal to the K-th is it found to the last bit, and
    then the first of the equal ones are kept. Kept entries stay in their order.

    Args:
        ordered: [R, C] from `to_ordered`, the smallest int32 where nothing is there.
        is_there: [R, C].

    Returns:
        places [R, C], CAPACITY or more where an entry is dropped, and how many are kept [R].
        Rows with fewer than K entries keep all.
    """
    count = tl.sum(is_there.to(tl.int32), 1)
    # At least K entries (or all) are at `low` or above; fewer than K are at `high` or above.
    low = tl.min(tl.where(is_there, ordered, _LARGEST), 1)
    high = tl.max(ordered, 1) + 1
    unsettled = (count > CAPACITY) & (low < high - 1)
    rounds = 0
    while tl.max(unsettled.to(tl.int32), 0) > 0:
        by_value = to_ordered(0.5 * from_ordered(low) + 0.5 * from_ordered(high))
        by_bits = (low >> 1) + (high >> 1) + (low & high & 1)
        probe = tl.where(rounds < _ROUNDS_BY_VALUE, by_value, by_bits)
        # Infinities and NaN put the middle anywhere.
        probe = tl.minimum(tl.maximum(probe, low + 1), high - 1)
        at_least = tl.sum((ordered >= probe[:, None]).to(tl.int32), 1)
        enough = at_least >= K
        low = tl.where(unsettled & enough, probe, low)
        count = tl.where(unsettled & enough, at_least, count)
        high = tl.where(unsettled & (at_least < K), probe, high)
        unsettled = (count > CAPACITY) & (low < high - 1)
        rounds += 1
    # Where more are equal to `low` than have room: the first ones only, up to some column.
    column = tl.arange(0, ordered.shape[1])
    end = tl.full(low.shape, ordered.shape[1], tl.int32)
    start = tl.zeros(low.shape, tl.int32)
    crowded = count > CAPACITY
    while tl.max(crowded.to(tl.int32), 0) > 0:
        middle = (start + end) >> 1
        kept = _is_kept(ordered, column, low, tl.where(crowded, middle, end))
        count = tl.sum(kept.to(tl.int32), 1)
        start = tl.where(crowded & (count < K), middle, start)
        end = tl.where(crowded & (count >= K), middle, end)
        crowded = crowded & ((count < K) | (count > CAPACITY))
    kept = _is_kept(ordered, column, low, end)
    place = tl.cumsum(kept.to(tl.int32), 1) - 1
    return tl.where(kept, place, CAPACITY), count


@triton.jit
def _is_kept(ordered, column, low, end):
    at_border = (ordered == low[:, None]) & (column[None, :] < end[:, None])
    return (ordered > low[:, None]) | at_border
