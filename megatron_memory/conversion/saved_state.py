"""A checkpoint of any format: the form between reading and writing."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_memory.config import Config
from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.training.checkpoint.generation import GenerationSettings

Tensors = dict[str, LazyTensor]
Twin = tuple[str, LazyTensor, LazyTensor]
"""Name, and two tensors that must be the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedState:
    """A model, and where its training stands, by Megatron's names and in whole tensors.

    The embedding and the output layer have `vocab_size` rows: padding belongs to a layout.
    """

    config: Config
    """Describes the model; where the format tells, the training as well."""
    vocab_size: int
    """Tokens before padding."""
    weights: Tensors
    """By the names that a Megatron checkpoint has."""
    main_weights: Tensors = dataclasses.field(default_factory=dict)
    """fp32 weights of a training whose own are bf16; by the same names, or empty."""
    moments: dict[str, Tensors] = dataclasses.field(default_factory=dict)
    """The optimizer's states by kind (exp_avg, exp_avg_sq), then by the same names; or empty."""
    usage: Tensors = dataclasses.field(default_factory=dict)
    """How much each memory layer read each slot in training, [S] by the names that a Megatron
    checkpoint has; or empty."""
    iteration: int = 0
    """Optimizer steps taken."""
    consumed_samples: int = 0
    """Sequences of the training data that they used."""
    common: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Other plain values of one of our own checkpoints; {} of other formats'."""
    tokenizer: Path | None = None
    """The folder or file of the tokenizer that came with it."""
    generation: GenerationSettings | None = None
    """Stop tokens, sampling and the like, where they came with it."""
    twins: tuple[Twin, ...] = ()
    """Tensors that the format keeps more than once, to be the same: name, one, another."""
    notes: tuple[str, ...] = ()
    """What the format could not say, or what was left out: for the user."""

    @property
    def exact_weights(self) -> Tensors:
        """The weights as precisely as they are known."""
        return self.weights | self.main_weights

    def without_optimizer(self) -> "SavedState":
        """The weights alone, nothing of their training."""
        return dataclasses.replace(self, main_weights={}, moments={}, usage={})
