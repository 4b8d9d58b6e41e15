"""The list of shapes, held to models that are built."""

import dataclasses

import pytest
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_memory.conversion.shapes import weight_shapes
from tests.tiny import VOCAB, one_rank, tiny_config, tiny_model

__all__ = ["one_rank"]

CASES = {
    "dense": (None, {}, {}),
    "qk-norm": (None, {}, {"qk_layernorm": True, "kv_channels": 12, "num_query_groups": 2}),
    "biases": ("memory+", {"value_dim": 24, "gated": True}, {"disable_bias_linear": False}),
    "beside": ("memory+", {"beside_mlp": True, "share_scope": "layer", "qk_norm": True}, {}),
    "pkm": ("pkm", {"value_dim": 24, "softmax_sink": True}, {"add_qkv_bias": True}),
    "peer": ("peer", {}, {"untie_embeddings_and_output_weights": True}),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_of_the_model(case: str):
    variant, memory, changes = CASES[case]
    config = tiny_config(variant, memory=memory)
    plain = {**vars(config.model), **changes}
    config = dataclasses.replace(config, model=type(config.model)(**plain))
    sharded = tiny_model(config).sharded_state_dict()
    apply_factories(sharded)
    listed = weight_shapes(config, VOCAB)
    found = [s for s in _flat(sharded) if isinstance(s, ShardedTensor)]
    assert len(found) > 20
    for shard in found:
        assert listed[shard.key] == tuple(shard.global_shape), shard.key


def _flat(value):
    if isinstance(value, dict):
        return [part for inner in value.values() for part in _flat(inner)]
    if isinstance(value, list):
        return [part for inner in value for part in _flat(inner)]
    return [value]
