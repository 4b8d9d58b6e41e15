"""The part of each sequence that a context-parallel rank computes."""

import torch

from megatron_memory.upstream import core

Batch = dict[str, torch.Tensor]


def share_of_sequences(batch: Batch, context_group: torch.distributed.ProcessGroup) -> Batch:
    """This rank's tokens of a batch that all context-parallel ranks read alike.

    In megatron-core's order: of 2 * CP equal pieces of a sequence, rank r has pieces r and
    2 * CP - 1 - r, so that under causal attention all ranks have equally much to do.

    Args:
        batch: tensors [sequences, seq_length], `attention_mask` [sequences, 1, seq_length,
            seq_length]; seq_length is a multiple of 2 * CP (`check_config`).
        context_group: the CP ranks that share the sequences.

    Returns:
        Tensors [sequences, seq_length / CP]; of the mask the rows of this rank's tokens.
    """
    return core.share_of_sequences(dict(batch), context_group)
