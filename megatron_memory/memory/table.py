"""Value tables, split by columns over the memory group's ranks and cut into chunks of rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.memory.group import MemoryGroup
from megatron_memory.memory.initialization import init_table_columns_
from memory_kernels import Fp8Shadow

MAX_CHUNK_ELEMENTS = 2**28
"""Of one parameter. Larger tables are several, which keeps each far below the 2^31 elements that
32-bit offsets reach, and lets DDP's buckets and a checkpoint's files be of like sizes."""


class ValueTable(MegatronModule):
    """S rows of D values, of which this rank holds C = D / (TP * M) columns.

    The rows are one parameter `weight`, or in large tables several, `weight_0` and so on: chunks of
    one size, of which only the last may be smaller.

    The gradient goes past autograd: readers add the rows that they read to DDP's `main_grad`, so
    that no temporary of the table's size is made.

    Args:
        config: the model's.
        num_readers: layers of this rank that read the table, each once in a microbatch.
        table_number: tells the tables of a model apart, for their initial values.
        group: the ranks that share the columns.
        replicas: the pipeline ranks with a copy of it, this one among them; None without copies.
        seed: of the run, for the initial values.
    """

    def __init__(
        self,
        config: MemoryTransformerConfig,
        *,
        num_readers: int,
        table_number: int,
        group: MemoryGroup,
        replicas: ProcessGroup | None = None,
        seed: int,
    ):
        super().__init__(config)
        self.group, self.replicas = group, replicas
        self.num_readers = num_readers
        self.on_gradient_ready: Callable[[], None] | None = None
        """Called in backward once every reader has added its part; DDP's overlap needs it."""
        self._num_microbatches, self._num_reads_done = 1, 0
        self._shadow: Fp8Shadow | None = None
        self._shadow_is_stale = True
        columns = group.columns(config.memory_value_dim)
        self._chunk_names = self._make_chunks(config, columns)
        self.register_load_state_dict_post_hook(lambda module, keys: module.weights_changed())
        if config.perform_initialization:
            init_table_columns_(
                self.chunks,
                std=config.memory_value_dim**-0.5,
                first_column=group.first_column(config.memory_value_dim),
                seed=seed,
                table_number=table_number,
            )

    def _make_chunks(self, config: MemoryTransformerConfig, columns: int) -> list[str]:
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        sizes = _chunk_rows(config.memory_num_slots, columns)
        names = ["weight"] if len(sizes) == 1 else [f"weight_{i}" for i in range(len(sizes))]
        for name, rows in zip(names, sizes, strict=True):
            chunk = torch.nn.Parameter(
                torch.empty(rows, columns, dtype=config.params_dtype, device=device)
            )
            set_tensor_model_parallel_attributes(chunk, is_parallel=True, dim=1, stride=1)
            # Megatron gives such parameters gradient buffers and an optimizer of their own.
            setattr(chunk, "allreduce", False)
            setattr(chunk, "is_memory_value", True)
            self._mark_copy(chunk)
            # Parameters of this very module, not of a ParameterList in it: the hook by which DDP
            # waits for gathered weights looks at the parameters of the module that is called.
            self.register_parameter(name, chunk)
        return names

    def _mark_copy(self, chunk: torch.nn.Parameter) -> None:
        """In Megatron's words for tied embeddings: a bucket of its own, so that all copies are
        sharded alike; and only the first counts in the gradient's norm."""
        if self.replicas is not None:
            setattr(chunk, "shared_embedding", True)
            setattr(chunk, "shared", self.replicas.rank() > 0)

    @property
    def chunks(self) -> list[torch.nn.Parameter]:
        """The rows in order, as `memory_kernels` takes a table."""
        return [self.get_parameter(name) for name in self._chunk_names]

    @property
    def learns(self) -> bool:
        """Whether it has a gradient: it is not frozen."""
        return self.chunks[0].requires_grad

    def forward(self, operand: Tensor) -> "TableRead":
        """What an operator takes to read the table once, in this pass and its backward.

        Args:
            operand: what the operator multiplies the table's rows by.
        """
        chunks = self.chunks
        main_grads = [getattr(chunk, "main_grad", None) for chunk in chunks]
        collects = self.learns and torch.is_grad_enabled() and main_grads[0] is not None
        if collects:
            if not operand.requires_grad:
                operand = operand.detach().requires_grad_()
            operand = _AfterBackward.apply(operand, self._count_read)
        return TableRead(
            chunks=chunks,
            operand=operand,
            main_grad=main_grads if collects else None,
            shadow=self._fresh_shadow(),
        )

    def expect_microbatches(self, number: int) -> None:
        """How many microbatches the coming backward passes are of, until the next call."""
        self._num_microbatches, self._num_reads_done = number, 0

    def _count_read(self) -> None:
        # Over the whole step, for interleaved stages mix the backward passes of microbatches.
        self._num_reads_done += 1
        if self._num_reads_done == self.num_readers * self._num_microbatches:
            self._num_reads_done = 0
            if self.on_gradient_ready is not None:
                self.on_gradient_ready()

    def weights_changed(self) -> None:
        """To be called after an update of the weights; loading a state dict does it, too."""
        self._shadow_is_stale = True

    @property
    def shadow(self) -> Fp8Shadow | None:
        """With `--memory-fp8-values`, what was read last: the weights in fp8, a scale for each row
        of this rank's columns. Never saved: it follows from the weights."""
        return self._shadow

    @torch.no_grad()
    def _fresh_shadow(self) -> Fp8Shadow | None:
        """The shadow of the present weights.

        Written when it is read and not at the update: only then has an overlapped gathering of the
        updated weights arrived, by DDP's hook on this module.
        """
        if self.config.memory.fp8_values and self._shadow_is_stale:
            if self._shadow is None:
                self._shadow = Fp8Shadow.of(self.chunks)
            else:
                self._shadow.write(self.chunks)
            self._shadow_is_stale = False
        return self._shadow

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None) -> dict:
        """The table as one tensor [S, D], however it is cut: by the group's ranks in dimension 1,
        and by chunks in dimension 0."""
        assert not sharded_offsets, "the tables are the model's, not a layer's"
        copy = 0 if self.replicas is None else self.replicas.rank()
        replica = (copy, 0, self.group.copies.rank())
        first_column = self.group.first_column(self.config.memory_value_dim)
        sharded, first_row = {}, 0
        for name, chunk in zip(self._chunk_names, self.chunks, strict=True):
            rows, columns = chunk.shape
            sharded[f"{prefix}{name}"] = ShardedTensor(
                key=f"{prefix}weight",
                data=chunk,
                dtype=chunk.dtype,
                local_shape=(rows, columns),
                global_shape=(self.config.memory_num_slots, self.config.memory_value_dim),
                global_offset=(first_row, first_column),
                # Not a regular grid: the last chunk may be smaller.
                axis_fragmentations=None,
                replica_id=replica,
            )
            first_row += rows
        return sharded


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableRead:
    """One read of a table; its fields are arguments of `memory_kernels`' operators."""

    chunks: list[torch.nn.Parameter]
    """The table."""
    operand: Tensor
    """The one given; when its gradient is there, the table's is complete, and the table hears."""
    main_grad: list[Any] | None
    """A buffer for each chunk's gradient; None without DDP, or where nothing learns."""
    shadow: Fp8Shadow | None
    """Read in the table's place."""

    def options(self) -> dict[str, Any]:
        """Keyword arguments of operators that read one table."""
        return {"main_grad": self.main_grad, "shadow": self.shadow}


def _chunk_rows(num_rows: int, columns: int) -> list[int]:
    """The rows of each chunk, as even as can be."""
    most = max(1, MAX_CHUNK_ELEMENTS // columns)
    rows = -(-num_rows // -(-num_rows // most))
    return [min(rows, num_rows - first) for first in range(0, num_rows, rows)]


class _AfterBackward(torch.autograd.Function):
    """The identity; calls back once the gradient of everything computed from it is there."""

    @staticmethod
    def forward(ctx, x: Tensor, callback: Callable[[], None]) -> Tensor:
        ctx.callback = callback
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        ctx.callback()
        return grad_output, None
