"""Bytes of the tensors that are alive, counted as torch makes and frees them."""

import collections
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NO_LABEL = "stream"


class LiveBytes(TorchDispatchMode):
    """Counts, while it is active, the storages that operators make: those alive, by what made them,
    and the most that ever were.

    Storages made before count nothing. A storage counts once, however many tensors view it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self.by_label: collections.Counter[str] = collections.Counter()
        self._labels = [NO_LABEL]
        self._seen: dict[int, tuple[int, str]] = {}

    def label_calls(self, module: torch.nn.Module, label: str) -> None:
        """What the module's forward pass makes counts under this label."""
        module.register_forward_pre_hook(lambda *_: self._labels.append(label))
        module.register_forward_hook(lambda *_: self._end(label))

    def _end(self, label: str) -> None:
        assert self._labels.pop() == label, "calls of labelled modules end in their order"

    def __enter__(self):
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resized
        return super().__enter__()

    def __exit__(self, *exception):
        torch.UntypedStorage.resize_ = self._resize
        return super().__exit__(*exception)

    @property
    def _resized(self):
        """Megatron's recompute empties storages and fills them again."""
        watch, resize = self, self._resize

        def resize_(storage: torch.UntypedStorage, size: int):
            result = resize(storage, size)
            if storage._cdata in watch._seen:
                before, label = watch._seen[storage._cdata]
                watch._seen[storage._cdata] = (size, label)
                watch._change(size - before, label)
            return result

        return resize_

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in inputs:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size, label = storage.nbytes(), self._labels[-1]
        self._seen[key] = (size, label)
        self._change(size, label)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        size, label = self._seen.pop(key)
        self._change(-size, label)

    def _change(self, difference: int, label: str) -> None:
        self.alive += difference
        self.by_label[label] += difference
        self.peak = max(self.peak, self.alive)
