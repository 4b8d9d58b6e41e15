"""Tensors of a Hugging Face folder that a model has twice, or computes itself.

None is dropped before it has been compared with what takes its place.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_memory.config import ModelConfig
from megatron_memory.conversion.hf_families import LLAMA3_ROPE, NAMES
from megatron_memory.conversion.lazy import LazyTensor
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.exceptions import CheckpointError

# Older versions of transformers saved them, with each layer or once.
_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq")


def with_one_head(stored: Tensors, values: Mapping[str, Any]) -> tuple[Tensors, bool, list[str]]:
    """Settle which tensor is the output layer, as transformers 5 does.

    | tie_word_embeddings | stored | the model |
    |---|---|---|
    | true | embedding | tied |
    | true | output layer | tied: it is the embedding as well |
    | true | both, equal | tied |
    | true | both, different | not tied: both are used |
    | false | both | not tied |

    Args:
        stored: all tensors of the folder.
        values: its configuration, with defaults.

    Returns:
        the tensors, whether the model is tied, and what to tell the user.
    """
    tied = bool(values["tie_word_embeddings"])
    if not tied or NAMES.output not in stored:
        return stored, tied, []
    if NAMES.embedding not in stored:
        note = (
            f"tie_word_embeddings is true and {NAMES.output} alone is stored: it is the embedding "
            "as well, as in transformers 5 (4 would leave the embedding at random)"
        )
        renamed = {
            NAMES.embedding if name == NAMES.output else name: tensor
            for name, tensor in stored.items()
        }
        return renamed, True, [note]
    if same_bits(stored[NAMES.output], stored[NAMES.embedding]):
        return {name: t for name, t in stored.items() if name != NAMES.output}, True, []
    note = (
        f"tie_word_embeddings is true, and {NAMES.output} is stored and differs from the "
        "embedding: both are used, as in transformers 5 (4 would drop it), and the model is "
        "converted as one that is not tied"
    )
    return stored, False, [note]


def same_bits(one: LazyTensor, another: LazyTensor) -> bool:
    """Whether two tensors are equal bit for bit; read in blocks."""
    if (one.shape, one.dtype) != (another.shape, another.dtype):
        return False
    return all(
        torch.equal(_bits(one.read_rows(begin, end)), _bits(another.read_rows(begin, end)))
        for begin, end in one.blocks()
    )


def _bits(tensor: Tensor) -> Tensor:
    # Not as numbers: NaN is unequal to itself, and 0 equal to -0.
    return tensor.contiguous().flatten().view(torch.uint8)


def without_frequencies(stored: Tensors, model: ModelConfig, where: Path) -> Tensors:
    """Leave out the rotary frequencies, which the configuration determines.

    Raises:
        CheckpointError: they are others than it says.
    """
    expected = _frequencies(model)
    for name, tensor in stored.items():
        if _FREQUENCIES.fullmatch(name):
            _check_frequencies(name, tensor, expected, where)
    return {name: t for name, t in stored.items() if not _FREQUENCIES.fullmatch(name)}


def _check_frequencies(name: str, tensor: LazyTensor, expected: Tensor, where: Path) -> None:
    shape = tuple(expected.shape)
    if tensor.shape == shape and tensor.dtype.is_floating_point:
        # Computed in fp32 or in the stored type, in this order of operations or another.
        rounding = 4 * max(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps)
        smallest = torch.finfo(tensor.dtype).tiny
        found = tensor.read().double()
        if bool(((found - expected).abs() <= rounding * expected + smallest).all()):
            return
    raise CheckpointError(
        f"{where}: {name} holds other rotary frequencies than config.json describes (rope_theta, "
        "rope_scaling, head_dim): which of the two is meant is not known. Correct config.json, or "
        "remove the tensor"
    )


def _frequencies(model: ModelConfig) -> Tensor:
    """fp64, one for each pair of a head's channels."""
    pairs = torch.arange(0, model.kv_channels, 2, dtype=torch.float64)
    plain = float(model.rotary_base) ** -(pairs / model.kv_channels)
    if not model.use_rope_scaling:
        return plain
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    positions = LLAMA3_ROPE["original_max_position_embeddings"]
    turns = positions * plain / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (smooth + (1 - smooth) / model.rope_scaling_factor)
