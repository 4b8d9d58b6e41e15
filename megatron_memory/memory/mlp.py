"""An MLP with a memory beside it."""

import dataclasses

from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor

from megatron_memory.memory.config import MemoryTransformerConfig
from megatron_memory.memory.group import MemoryGroup
from megatron_memory.memory.layer import MemoryLayer, MemoryLayerSubmodules


@dataclasses.dataclass
class MLPWithMemorySubmodules(MLPSubmodules):
    """The MLP's own linear layers, and the memory's."""

    memory: MemoryLayerSubmodules = dataclasses.field(default_factory=MemoryLayerSubmodules)


class MLPWithMemory(MLP):
    """mlp(x) + memory(x), with `--memory-beside-mlp`.

    In checkpoints the MLP's weights keep a dense layer's names; the memory's are under `memory.`.

    Megatron's recompute of MLPs computes both again, routing included. With `memory_recompute` the
    memory keeps to its own, and the MLP alone is computed again.
    """

    def __init__(
        self,
        config: MemoryTransformerConfig,
        submodules: MLPWithMemorySubmodules,
        group: MemoryGroup,
        **_: object,
    ):
        """`_`: what megatron-core's layers since 0.18 tell their MLPs."""
        super().__init__(
            config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=group.tp
        )
        self.memory = MemoryLayer(config, submodules.memory, group)
        modules = config.recompute_modules or ()
        self._recomputes_mlp = (
            config.memory_recompute
            and config.recompute_granularity == "selective"
            and "mlp" in modules
        )

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's layer number, counted from 1 over the whole model."""
        self.memory.set_layer_number(layer_number)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None):
        """x [s, b, hidden] (s is this rank's share under sequence parallelism) to (output, bias).

        The padding mask is Megatron's for MoE layers and is not used.
        """
        output, bias = self._mlp(x)
        read, memory_bias = self.memory(x)
        return output + read, _sum(bias, memory_bias)

    def _mlp(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._recomputes_mlp and self.training:
            return checkpoint(super().forward, False, x)
        return super().forward(x)


def memory_of(mlp: object) -> MemoryLayer | None:
    """The memory layer that a transformer layer's `mlp` is, or has beside it."""
    if isinstance(mlp, MLPWithMemory):
        return mlp.memory
    return mlp if isinstance(mlp, MemoryLayer) else None


def _sum(bias: Tensor | None, other: Tensor | None) -> Tensor | None:
    if bias is None or other is None:
        return other if bias is None else bias
    return bias + other
