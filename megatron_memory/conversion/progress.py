"""How far the writing is."""

import contextlib
import dataclasses
from collections.abc import Iterator

from torch import Tensor
from tqdm import tqdm

from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.conversion.saved_state import SavedState, Tensors


@contextlib.contextmanager
def shown(state: SavedState, what: str) -> Iterator[SavedState]:
    """The same state, whose tensors move a bar as they are read: bytes, speed and time left.

    Nothing is shown where the output is no terminal.
    """
    parts = [state.weights, state.main_weights, *state.moments.values()]
    total = sum(tensor.num_bytes for part in parts for tensor in part.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None) as bar:

        def counted(tensors: Tensors) -> Tensors:
            return {name: _counted(tensor, bar) for name, tensor in tensors.items()}

        yield dataclasses.replace(
            state,
            weights=counted(state.weights),
            main_weights=counted(state.main_weights),
            moments={kind: counted(moments) for kind, moments in state.moments.items()},
        )


def _counted(tensor: LazyTensor, bar: tqdm) -> LazyTensor:
    def read_rows(begin: int, end: int) -> Tensor:
        rows = tensor.read_rows(begin, end)
        bar.update(min(rows.nbytes, max(0, bar.total - bar.n)))
        return rows

    return dataclasses.replace(tensor, read_rows=read_rows)
