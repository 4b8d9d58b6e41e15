"""megatron-core 0.19, for Python 3.12 and 3.13."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NULL_TOKENIZER = "null-text"
"""Library of the tokenizer without text."""


def null_vocab_size(num_tokens: int) -> int:
    """The size by which that tokenizer has so many ids and, after them, the end of document."""
    return num_tokens + 1


def share_of_sequences(
    batch: dict[str, torch.Tensor], context_group: torch.distributed.ProcessGroup
) -> dict[str, torch.Tensor]:
    """A context-parallel rank's part of each sequence."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=context_group)


def inference_wrapper(
    model: torch.nn.Module, batch_size: int, num_positions: int, padded_vocab_size: int
):
    """The model with a KV cache for so many sequences of so many positions."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )

    return GPTInferenceWrapper(model, StaticInferenceContext(batch_size, num_positions))
