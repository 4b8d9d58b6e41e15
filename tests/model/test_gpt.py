"""The model: Megatron's own where there is no memory, its norms, its names in a checkpoint."""

import dataclasses
import math

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

from megatron_memory.config import ModelConfig
from megatron_memory.memory.layer import MemoryLayer
from megatron_memory.model.norms import LayerNorm, RMSNorm
from megatron_memory.runtime.distributed import seed_everything
from tests.tiny import SEQUENCE, VOCAB, tiny_batch, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_rank")

OF_EVERY_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
}
OF_AN_MLP = {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
OF_A_ROUTER = {
    "pre_mlp_layernorm.weight",
    "mlp.router.query.weight",
    "mlp.router.query.bias",
    "mlp.router.keys",
}
OF_A_MEMORY = {
    "mlp.linear_fc1.weight",
    "mlp.linear_fc1.bias",
    "mlp.linear_fc2.weight",
    "mlp.linear_fc2.bias",
}
OF_ALL_OPTIONS = {
    "mlp.router.query_norm",
    "mlp.router.key_norm",
    "mlp.router.sink",
    "mlp.gate.weight",
    "mlp.gate.bias",
}
ALL_OPTIONS = {"qk_norm": True, "softmax_sink": True, "gated": True}

SHAPES = {
    "dense": {},
    "gqa, untied": {"num_query_groups": 2, "untie_embeddings_and_output_weights": True},
    "qk-layernorm, interleaved": {"qk_layernorm": True, "rotary_interleaved": True},
    "experts": {"num_experts": 2},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_without_memory_it_is_megatrons_gpt(shape: str):
    ours = tiny_model(tiny_config(None, model=SHAPES[shape]))
    seed_everything(1234)
    spec = get_gpt_decoder_block_spec(
        ours.config, use_transformer_engine=False, normalization="RMSNorm"
    )
    theirs = GPTModel(
        ours.config,
        spec,
        vocab_size=VOCAB,
        max_sequence_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape != "gqa, untied",
    )
    assert ours.memory is None
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    batch = tiny_batch()
    del batch["labels"]
    logits, wanted = ours(**batch), theirs(**batch)
    assert logits.shape == (2, SEQUENCE, VOCAB)
    assert torch.equal(logits, wanted)
    logits.square().sum().backward()
    wanted.square().sum().backward()
    for (name, our), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(our.grad, their.grad), name


def test_memory_layers_stand_where_they_were_asked_for():
    model = tiny_model(tiny_config("memory+"))
    found = [isinstance(layer.mlp, MemoryLayer) for layer in model.decoder.layers]
    assert found == [False, True, False, True]
    assert [layer.layer_number for layer in model.memory_layers()] == [2, 4]


def test_the_other_layers_begin_as_without_memory():
    """A comparison with the dense baseline starts from the same embedding."""
    first = tiny_model(tiny_config("memory+")).embedding.word_embeddings.weight
    second = tiny_model(tiny_config(None)).embedding.word_embeddings.weight
    assert torch.equal(first, second)


def _names(config) -> set[str]:
    state = tiny_model(config).sharded_state_dict()
    kinds = (ShardedTensor, ShardedTensorFactory)
    return {shard.key for shard in state.values() if isinstance(shard, kinds)}


def _layers(*of_each: set[str]) -> set[str]:
    names = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    for number, of_layer in enumerate(of_each):
        names |= {f"decoder.layers.{number}.{name}" for name in of_layer | OF_EVERY_LAYER}
    return names


def test_names_in_a_checkpoint_of_memory_plus():
    """Layers of both kinds have Transformer Engine's names; the shared table is the model's."""
    with_memory = OF_A_ROUTER | OF_A_MEMORY
    wanted = _layers(OF_AN_MLP, with_memory, OF_AN_MLP, with_memory)
    assert _names(tiny_config("memory+")) == wanted | {"memory.shared.values.weight"}


def test_names_in_a_checkpoint_with_all_options():
    config = tiny_config(
        "memory+",
        memory=ALL_OPTIONS | {"share_scope": "layer"},
        model={"untie_embeddings_and_output_weights": True},
    )
    with_memory = OF_A_ROUTER | OF_A_MEMORY | OF_ALL_OPTIONS
    assert _names(config) == _layers(OF_AN_MLP, with_memory, OF_AN_MLP, with_memory) | {
        "output_layer.weight",
        "memory.layer_1.values.weight",
        "memory.layer_3.values.weight",
    }


@pytest.mark.parametrize(
    ("variant", "tables"), [("pkm", ["values"]), ("peer", ["values_u", "values_v"])]
)
def test_names_in_a_checkpoint_of_layers_without_projection(variant: str, tables: list[str]):
    wanted = _layers(OF_AN_MLP, OF_A_ROUTER, OF_AN_MLP, OF_A_ROUTER)
    wanted |= {f"memory.shared.{table}.weight" for table in tables}
    assert _names(tiny_config(variant)) == wanted


@pytest.mark.parametrize("kind, num_parameters", [(RMSNorm, 1), (LayerNorm, 2)])
def test_norms_are_marked_for_sequence_parallelism(kind: type, num_parameters: int):
    config = tiny_model(tiny_config("memory+")).config
    for sequence_parallel in (False, True):
        config.sequence_parallel = sequence_parallel
        norm = kind(config, 32, eps=1e-3)
        assert norm.eps == 1e-3
        marks = [parameter.sequence_parallel for parameter in norm.parameters()]
        assert marks == [sequence_parallel] * num_parameters


def test_every_norm_of_the_model_is_ours():
    model = tiny_model(tiny_config("memory+", model={"qk_layernorm": True}))
    kinds = [type(m) for m in model.modules() if isinstance(m, torch.nn.RMSNorm)]
    # Before attention, of its queries and keys, before the MLP: four layers; and the final one.
    assert kinds == [RMSNorm] * (4 * 4 + 1)


def test_norm_is_its_formula():
    config = tiny_model(tiny_config(None)).config
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    norm = RMSNorm(config, 32, eps=1e-2)
    wanted = x / (x.square().mean(dim=-1, keepdim=True) + 1e-2).sqrt()
    torch.testing.assert_close(norm(x), wanted)


@pytest.mark.parametrize("position", ["learned_absolute", "rope", "none"])
def test_gpt2_style_models_take_memory_layers_too(position: str):
    """LayerNorm, biases, GELU: what the flags describe without memory also works with it."""
    model = ModelConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        seq_length=SEQUENCE,
        position_embedding_type=position,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    losses = tiny_model(dataclasses.replace(tiny_config("memory+"), model=model))(**tiny_batch())
    assert losses.shape == (2, SEQUENCE)
    losses.sum().backward()
    assert losses.mean().item() == pytest.approx(math.log(VOCAB), abs=1.0)
