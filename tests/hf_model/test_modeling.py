"""The exported model by itself: what transformers asks of it. That it equals ours:
tests/conversion/test_hf_memory.py."""

import copy

import pytest
import torch

from megatron_memory.hf_model.configuration_memory_llama import MemoryLlamaConfig
from megatron_memory.hf_model.modeling_memory_llama import MemoryLlamaForCausalLM, _topk

VOCAB, SEQUENCE = 64, 16
EVERYTHING = {
    "memory_qk_norm": True,
    "memory_softmax_sink": True,
    "memory_gated": True,
    "memory_share_scope": "layer",
    "qk_norm": True,
    "qkv_bias": True,
}
CASES = {
    "memory+": {"memory_value_dim": 48, **EVERYTHING},
    "peer": {"memory_variant": "peer"},
    "beside": {"memory_variant": "pkm", "memory_beside_mlp": True},
}


def tiny_settings(**settings) -> dict:
    """Four layers, two of them with memory."""
    return {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2 * SEQUENCE,
        "pad_token_id": 0,
        "memory_layers": [1, 3],
        "memory_num_heads": 2,
        "memory_top_k": 4,
        "memory_num_half_keys": 8,
    } | settings


def tiny_hf_model(**settings) -> MemoryLlamaForCausalLM:
    """With weights large enough that every part of it is seen in the logits."""
    torch.manual_seed(1)
    model = MemoryLlamaForCausalLM(MemoryLlamaConfig(**tiny_settings(**settings))).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_generates_alike_with_cache_without_it_and_behind_padding(settings, tokens):
    model = tiny_hf_model(**settings)
    prompt = tokens[:1, :5]
    options = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(prompt, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), prompt), dim=1)
    batch = torch.cat((padded, tokens[1:, :8]))
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    assert torch.equal(model.generate(batch, attention_mask=mask, **options)[:1, 3:], cached)
    beams = model.generate(batch, attention_mask=mask, num_beams=3, **options)
    assert beams.shape == (2, 16)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_do_not_depend_on_what_is_asked_for_beside_them(implementation, tokens):
    """Attention to later tokens, for one, would change them."""
    model = tiny_hf_model(**CASES["memory+"])
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation(implementation)
        for attention_mask in (mask, None):
            rows = slice(0, 2) if attention_mask is not None else slice(1, 2)
            asked = model(
                tokens[rows],
                attention_mask=attention_mask,
                output_attentions=True,
                output_hidden_states=True,
            )
            torch.testing.assert_close(asked.logits[:, 3:], expected[rows, 3:])
            assert len(asked.hidden_states) == 5
    if implementation == "eager":
        assert len(asked.attentions) == 4
        assert asked.attentions[0].triu(1).abs().max() == 0


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradients_of_every_weight_with_and_without_checkpointing(settings, tokens):
    model = tiny_hf_model(**settings).train()
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    without = [name for name, gradient in gradients[0].items() if gradient is None]
    assert not without
    assert losses[0] == losses[1]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("variant", ["memory+", "peer"])
def test_a_table_of_several_parameters_is_the_same_table(variant, tokens):
    whole = tiny_hf_model(memory_variant=variant)
    # 6 rows: 11 chunks, the last of 4.
    cut = tiny_hf_model(memory_variant=variant, memory_max_chunk_elements=6 * 32)
    weights = whole.state_dict()
    for name in [name for name in weights if ".chunks." in name]:
        for i, rows in enumerate(weights.pop(name).split(cut.config.memory_chunk_rows())):
            weights[name.replace(".chunks.0.", f".chunks.{i}.")] = rows
    cut.load_state_dict(weights)
    assert len(cut.config.memory_chunk_rows()) == 11
    for model in (whole, cut):
        model(tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        # fp32; only the order of a sum of 8 rows differs.
        torch.testing.assert_close(cut(tokens).logits, whole(tokens).logits, rtol=0, atol=1e-5)
    for name, parameter in whole.named_parameters():
        if ".chunks." in name:
            stem = name.removesuffix("0.weight")
            parts = [p.grad for n, p in cut.named_parameters() if n.startswith(stem)]
            torch.testing.assert_close(torch.cat(parts), parameter.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_tables_are_the_models_present_ones(tokens):
    """Copies and replicas of a model, and tables that a wrapper puts in the place of others."""
    model = tiny_hf_model()
    logits = model(tokens).logits
    model.model.memory_tables = copy.deepcopy(model.model.memory_tables)
    for parameter in model.model.memory_tables.parameters():
        parameter.zero_()
    assert (model(tokens).logits - logits).abs().max() > 1e-3


def test_equal_scores_fall_to_the_lower_index():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0, 2.0, 2.0, 0.0]])
    index = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])
    assert _topk(scores, torch.arange(8), 5).tolist() == [[1, 2, 4, 3, 5]]
    assert _topk(scores, index, 5).tolist() == [[4, 2, 1, 6, 5]]
    assert _topk(torch.zeros(1, 8), index, 8).tolist() == [[7, 6, 5, 4, 3, 2, 1, 0]]


def test_initial_weights_are_the_papers():
    model = tiny_hf_model(hidden_size=64, memory_num_half_keys=32, **EVERYTHING)
    fresh = MemoryLlamaForCausalLM(model.config)
    layer = fresh.model.layers[1].memory
    table = fresh.model.memory_tables["layer_1"].values.chunks[0].weight
    # 65,536 values: their deviation is known to 1%; the linear layer's 4,096 to 4%.
    assert table.std().item() == pytest.approx(64**-0.5, rel=0.02)
    for linear in (layer.value_gate, layer.value_proj):
        assert linear.weight.std().item() == pytest.approx(64**-0.5, rel=0.06)
        assert not linear.bias.any()
    keys, bound = layer.router.keys.abs(), model.config.memory_key_dim**-0.5
    assert 0.99 * bound < keys.max() <= bound
    assert layer.router.key_norm.tolist() == pytest.approx([bound] * 32)
    assert layer.router.query.weight.abs().max() <= (6 / (64 + 64)) ** 0.5


def test_random_values_and_dropout_are_for_training_alone(tokens):
    noisy = {"memory_num_random_values": 2, "memory_query_dropout": 0.2}
    model = tiny_hf_model(memory_value_dropout=0.2, **noisy)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model(tokens).logits)
        model.train()
        assert not torch.equal(model(tokens).logits, model(tokens).logits)


def test_half_precision_runs_and_learns(tokens):
    for dtype in (torch.bfloat16, torch.float16):
        for settings in CASES.values():
            model = tiny_hf_model(**settings).to(dtype)
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            assert model(tokens).logits.dtype == dtype
            assert loss.isfinite()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"memory_variant": "memory"}, "memory_variant"),
        ({"memory_layers": [1, 4]}, "memory_layers"),
        ({"memory_layers": [1, 1]}, "memory_layers"),
        ({"memory_top_k": 9}, "memory_top_k"),
        ({"memory_key_dim": 7}, "memory_key_dim"),
        ({"memory_variant": "peer", "memory_value_dim": 16}, "memory_value_dim"),
        ({"memory_share_scope": "stage", "memory_share_groups": [[1]]}, "memory_share_groups"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        MemoryLlamaConfig(**tiny_settings(**settings))
