"""Tables in row chunks.

A table is one tensor [S, D] or a list of row chunks, all of the first one's size but the last,
which may be smaller: row r is row r % chunk_rows of chunk r // chunk_rows. Chunks keep single
tensors below 2^31 elements and let Megatron balance them over ranks.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from memory_kernels.checks import check_type


def as_chunks(table: Tensor | Sequence[Tensor], name: str = "table") -> list[Tensor]:
    """The table's chunks, checked.

    Raises:
        ValueError: not [S, D] floating point tensors of one dtype, device and width, whose columns
            are contiguous, in chunks of one size but the last.
    """
    chunks = [table] if table is None or isinstance(table, Tensor) else list(table)
    if not chunks:
        raise ValueError(f"{name}: a tensor or a list of row chunks wanted, got an empty list")
    first = chunks[0]
    for chunk in chunks:
        check_type(name, chunk, Tensor)
        if chunk.dim() != 2 or not chunk.is_floating_point():
            raise ValueError(f"{name}: [S, D] floating point wanted, got {describe(chunk)}")
        if chunk.shape[1] > 1 and chunk.stride(1) != 1:
            raise ValueError(
                f"{name}: contiguous columns wanted, got strides {tuple(chunk.stride())}; call "
                ".contiguous() once, not at every read"
            )
        alike = (chunk.dtype, chunk.device, chunk.shape[1], chunk.stride(0))
        if alike != (first.dtype, first.device, first.shape[1], first.stride(0)):
            raise ValueError(
                f"{name}: chunks of one dtype, device, width and stride wanted, got "
                f"{describe(first)} and {describe(chunk)}"
            )
    sizes = [len(chunk) for chunk in chunks]
    if any(size != sizes[0] for size in sizes[:-1]) or sizes[-1] > sizes[0]:
        raise ValueError(
            f"{name}: chunks of one size wanted, only the last may be smaller; got {sizes} rows"
        )
    return chunks


def describe(tensor: Tensor) -> str:
    """Shape and dtype, for messages."""
    return f"{list(tensor.shape)} {tensor.dtype}"


def num_rows(chunks: Sequence[Tensor]) -> int:
    """S, over all chunks."""
    return sum(len(chunk) for chunk in chunks)


def gather_rows(chunks: Sequence[Tensor], rows: Tensor) -> Tensor:
    """[R, D]: rows [R] (ascending, as from torch.unique) of all chunks, one after the other."""
    if len(chunks) == 1:
        return chunks[0].index_select(0, rows)
    return torch.cat(
        [chunk.index_select(0, local) for chunk, local, _ in rows_by_chunk(chunks, rows)]
    )


def rows_by_chunk(chunks: Sequence[Tensor], rows: Tensor):
    """For each chunk: the chunk, the ascending rows that lie in it, counted from its first, and the
    slice of `rows` that they are."""
    chunk_rows = len(chunks[0])
    borders = torch.arange(len(chunks) + 1, device=rows.device, dtype=rows.dtype) * chunk_rows
    cuts = torch.searchsorted(rows, borders).tolist()
    for number, chunk in enumerate(chunks):
        part = slice(cuts[number], cuts[number + 1])
        yield chunk, rows[part] - number * chunk_rows, part


def kernel_table(chunks: Sequence[Tensor]) -> Tensor:
    """What kernels take for a table: the tensor itself, or the int64 addresses of its chunks."""
    if len(chunks) == 1:
        return chunks[0]
    if chunks[0].is_meta:
        return torch.empty(len(chunks), dtype=torch.int64, device="meta")
    return _addresses(tuple(chunk.data_ptr() for chunk in chunks), chunks[0].device)


# A forgotten entry costs a copy that waits for the device, and its memory may be in a CUDA graph
# that reads it still: more entries than a large model has tables, states and buffers.
@functools.lru_cache(maxsize=4096)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(pointers, dtype=torch.int64, device=device)
