"""Value tables, split by columns over the tensor-parallel ranks."""

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer import MegatronModule
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.memory.initialization import init_table_columns_


class ValueTable(MegatronModule):
    """S rows of D values, of which this rank holds C = D / tensor-parallel-size columns.

    The gradient goes past autograd: readers add the rows that they read to DDP's `main_grad`, so
    that no temporary of the table's size is made.

    Args:
        config: the model's.
        num_readers: layers of this rank that read the table, each once in a microbatch.
        table_number: tells the tables of a model apart, for their initial values.
        tp_group: tensor-parallel process group.
        seed: of the run, for the initial values.
    """

    def __init__(
        self,
        config: MemoryTransformerConfig,
        *,
        num_readers: int,
        table_number: int,
        tp_group: torch.distributed.ProcessGroup,
        seed: int,
    ):
        super().__init__(config)
        self.tp_group = tp_group
        self.num_readers = num_readers
        self.on_gradient_ready: Callable[[], None] | None = None
        """Called in backward once every reader has added its part; DDP's overlap needs it."""
        self._num_reads_done = 0
        columns = config.memory_value_dim // tp_group.size()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(config.memory_num_slots, columns, dtype=config.params_dtype, device=device)
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=1, stride=1)
        # Megatron gives such parameters gradient buffers and an optimizer of their own.
        setattr(self.weight, "allreduce", False)
        setattr(self.weight, "is_memory_value", True)
        if config.perform_initialization:
            init_table_columns_(
                self.weight,
                std=config.memory_value_dim**-0.5,
                first_column=tp_group.rank() * columns,
                seed=seed,
                table_number=table_number,
            )

    def forward(self, operator: Callable[..., Tensor], indices: Tensor, operand: Tensor) -> Tensor:
        """operator(table, indices, operand), an operator of `memory_kernels.bag`."""
        main_grad = getattr(self.weight, "main_grad", None)
        if main_grad is None or not (self.weight.requires_grad and torch.is_grad_enabled()):
            return operator(self.weight, indices, operand)
        if not operand.requires_grad:
            operand = operand.detach().requires_grad_()
        operand = _AfterBackward.apply(operand, self._count_read)
        return operator(self.weight, indices, operand, main_grad=main_grad)

    def _count_read(self) -> None:
        self._num_reads_done += 1
        if self._num_reads_done == self.num_readers:
            self._num_reads_done = 0
            if self.on_gradient_ready is not None:
                self.on_gradient_ready()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets=(), metadata=None) -> dict:
        """The table as one tensor [S, D], split over the tensor-parallel ranks in dimension 1."""
        key = f"{prefix}weight"
        return {
            key: make_tp_sharded_tensor_for_checkpoint(
                self.weight,
                key,
                tp_axis=1,
                prepend_offsets=sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        }


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


class MemoryTables(MegatronModule):
    """All value tables of a model, held at its root: saved once, counted once, reduced once.

    Args:
        config: the model's.
        layers: the memory layers on this rank, counted from 0 over the whole model.
        tp_group: tensor-parallel process group.
    """

    def __init__(
        self,
        config: MemoryTransformerConfig,
        layers: tuple[int, ...],
        tp_group: torch.distributed.ProcessGroup,
    ):
        super().__init__(config)
        self.share_scope = config.memory.share_scope
        owners = ["shared"] if self.share_scope == "model" else [f"layer_{i}" for i in layers]
        for owner in owners:
            number = 0 if owner == "shared" else 1 + int(owner.removeprefix("layer_"))
            self.add_module(owner, self._tables(config, number, layers, tp_group))

    def _tables(self, config, number: int, layers, tp_group) -> "_OwnedTables":
        num_readers = len(layers) if self.share_scope == "model" else 1
        names = ("values_u", "values_v") if config.memory.variant == "peer" else ("values",)
        return _OwnedTables(
            config,
            {
                name: ValueTable(
                    config,
                    num_readers=num_readers,
                    table_number=2 * number + i,
                    tp_group=tp_group,
                    seed=config.memory_seed,
                )
                for i, name in enumerate(names)
            },
        )

    def of_layer(self, layer: int) -> "_OwnedTables":
        """The tables that a layer, counted from 0, reads."""
        return self.get_submodule("shared" if self.share_scope == "model" else f"layer_{layer}")

    def tables(self) -> list[ValueTable]:
        """Every table on this rank."""
        return [module for module in self.modules() if isinstance(module, ValueTable)]


class _OwnedTables(MegatronModule):
    """The tables that one layer reads, by name: `values`, or PEER's `values_u` and `values_v`."""

    def __init__(self, config: MemoryTransformerConfig, tables: dict[str, ValueTable]):
        super().__init__(config)
        for name, table in tables.items():
            self.add_module(name, table)
