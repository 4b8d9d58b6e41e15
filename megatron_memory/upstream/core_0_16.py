"""megatron-core 0.16, for Python 3.10 and 3.11."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NULL_TOKENIZER = "null"
"""Library of the tokenizer without text."""


def null_vocab_size(num_tokens: int) -> int:
    """The size by which that tokenizer has so many ids and, after them, the end of document."""
    return num_tokens


def share_of_sequences(
    batch: dict[str, torch.Tensor], context_group: torch.distributed.ProcessGroup
) -> dict[str, torch.Tensor]:
    """A context-parallel rank's part of each sequence."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    return get_batch_on_this_cp_rank(batch, cp_group=context_group)


def inference_wrapper(
    model: torch.nn.Module, batch_size: int, num_positions: int, padded_vocab_size: int
):
    """The model with a KV cache for so many sequences of so many positions."""
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
        InferenceWrapperConfig,
    )
    from megatron.core.utils import get_model_config

    config = get_model_config(model)
    settings = InferenceWrapperConfig(
        hidden_size=config.hidden_size,
        params_dtype=config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=padded_vocab_size,
        inference_max_requests=batch_size,
        inference_max_seq_length=num_positions,
    )
    return GPTInferenceWrapper(model, settings, StaticInferenceContext(batch_size, num_positions))
