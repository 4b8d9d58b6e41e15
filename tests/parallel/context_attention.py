"""Attention under context parallelism on the CPU: a stand-in for Transformer Engine's, for tests.

megatron-core's local attention refuses context parallelism and Transformer Engine's runs on GPUs
only. This one gathers the keys and values of all context-parallel ranks and masks them by their
places in the sequence; everything around it, the model's and ours, is what runs on GPUs too.
"""

import copy
from dataclasses import replace

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention

from megatron_memory.model import specs


class GatheredAttention(DotProductAttention):
    """Causal attention of this rank's queries over all ranks' keys and values."""

    def __init__(self, config, *args, **options):
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **options)

    def forward(self, query, key, value, attention_mask, **options):
        """query, key and value [s / CP, b, heads, width] in the order of `share_of_sequences`."""
        assert attention_mask is None, "this stand-in makes its own mask"
        group = self.pg_collection.cp
        # Its backward is the reduce-scatter that sums what the ranks' queries ask of a key.
        key = gather_from_sequence_parallel_region(key, group=group)
        value = gather_from_sequence_parallel_region(value, group=group)
        length = query.shape[0]
        places = [_places(rank, group.size(), length) for rank in range(group.size())]
        is_later = torch.cat(places) > places[group.rank()][:, None]
        return super().forward(query, key, value, is_later[None, None], **options)


def _places(rank: int, num_ranks: int, length: int) -> torch.Tensor:
    """Where a rank's tokens stand in the sequence: pieces r and 2 * CP - 1 - r of 2 * CP."""
    piece = torch.arange(length // 2)
    return torch.cat(
        [piece + number * (length // 2) for number in (rank, 2 * num_ranks - 1 - rank)]
    )


def use_gathered_attention() -> None:
    """Put it in place of local attention in every model that this process builds from now on."""
    make = specs.get_gpt_decoder_block_spec

    def with_gathered_attention(*args, **options):
        block = make(*args, **options)
        return replace(block, layer_specs=[_replaced(layer) for layer in block.layer_specs])

    specs.get_gpt_decoder_block_spec = with_gathered_attention
    # megatron-core cuts the rotary angles with an index in pinned memory, which only GPUs have.
    setattr(rope_utils, "torch", _TorchWithoutPinnedMemory())


class _TorchWithoutPinnedMemory:
    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def tensor(*args, pin_memory: bool, **options):
        return torch.tensor(*args, **options)


def _replaced(layer):
    attention = layer.submodules.self_attention
    submodules = replace(attention.submodules, core_attention=GatheredAttention)
    return replace(
        layer,
        submodules=replace(
            layer.submodules, self_attention=replace(attention, submodules=submodules)
        ),
    )
