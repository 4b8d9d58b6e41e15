"""Dense models of Hugging Face's families, made and run by transformers itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_memory.conversion.convert import convert
from megatron_memory.conversion.evaluate import hf_logits, megatron_logits, state_logits
from megatron_memory.conversion.hf import _with_defaults, read_hf, write_hf
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.exceptions import CheckpointError, ConfigurationError
from tests.conversion.states import (
    HF_MODELS,
    assert_same_tensors,
    conversion,
    read_all,
    save_hf_model,
)

# Rounding of fp32 over two layers: some 20 units in the last place of logits near 5.
TOLERANCE = 2e-5
TOKENS = torch.randint(0, 91, (2, 48), generator=torch.Generator().manual_seed(9))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


@pytest.mark.parametrize("name", HF_MODELS)
def test_there_and_back(name: str, tmp_path: Path):
    """The logits of transformers' model, from a checkpoint that a training loads; then its files
    again, bit for bit, with a configuration that makes the same model."""
    hugging_face = tmp_path / "hf"
    model = save_hf_model(name, hugging_face)
    with torch.inference_mode():
        expected = model(TOKENS).logits
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    convert(
        conversion("hf", hugging_face, "megatron", megatron, target_tensor_parallel_size=2), print
    )
    assert (megatron_logits(megatron, TOKENS) - expected).abs().max() < TOLERANCE

    family = HF_MODELS[name].model_type
    convert(conversion("megatron", megatron, "hf", back, hf_model_type=family), print)
    assert_same_tensors(_weights(back), _weights(hugging_face))
    again = type(model).from_pretrained(back).eval()
    with torch.inference_mode():
        assert torch.equal(again(TOKENS).logits, expected)


@pytest.mark.parametrize(("name", "family"), [("qwen2", "qwen2"), ("mistral", "llama")])
def test_family_is_found(name: str, family: str, tmp_path: Path):
    save_hf_model(name, tmp_path / "hf")
    (tmp_path / "back").mkdir()
    write_hf(read_hf(tmp_path / "hf"), tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == family


def test_shards_of_bf16(tmp_path: Path):
    """Several files with an index, and weights of half the bytes: all read and written alike."""
    save_hf_model("llama", tmp_path / "hf", torch.bfloat16, max_shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    convert(conversion("hf", tmp_path / "hf", "megatron", tmp_path / "megatron"), print)
    convert(
        conversion(
            "megatron", tmp_path / "megatron", "hf", tmp_path / "back", max_shard_size="40KB"
        ),
        print,
    )
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 and max(file.stat().st_size for file in files) < 45_000
    assert_same_tensors(_weights(tmp_path / "back"), _weights(tmp_path / "hf"))


def test_pickled_weights_are_read(tmp_path: Path):
    model = save_hf_model("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    again = state_logits(read_hf(tmp_path), torch.float32, TOKENS)
    with torch.inference_mode():
        assert (again - model(TOKENS).logits).abs().max() < TOLERANCE


def test_pairs_become_halves(tmp_path: Path):
    """A model that rotates adjacent pairs: its weights are permuted on the way out."""
    save_hf_model("qwen3", tmp_path / "hf")
    state = read_hf(tmp_path / "hf")
    replaced = {**vars(state.config.model), "rotary_interleaved": True}
    model = type(state.config.model)(**replaced)
    config = type(state.config)(**{**vars(state.config), "model": model})
    pairs = SavedState(config=config, vocab_size=91, weights=state.weights)
    (tmp_path / "out").mkdir()
    write_hf(pairs, tmp_path / "out")
    out = type(save_hf_model("qwen3", tmp_path / "other")).from_pretrained(tmp_path / "out")
    with torch.inference_mode():
        written = out.eval()(TOKENS).logits
    expected = state_logits(pairs, torch.float32, TOKENS)
    assert (written - expected).abs().max() < TOLERANCE
    assert (state_logits(state, torch.float32, TOKENS) - expected).abs().max() > 0.01


def test_window_limits_the_positions(tmp_path: Path):
    save_hf_model("mistral", tmp_path)
    state = read_hf(tmp_path)
    assert state.config.model.max_position_embeddings == 50
    assert any("sliding_window 50" in note for note in state.notes)


def _two_heads(folder: Path, change) -> None:
    """A tied model whose stored tensors are changed."""
    save_hf_model("qwen3", folder)
    stored = load_file(folder / "model.safetensors")
    save_file(change(stored), folder / "model.safetensors", {"format": "pt"})


def _only_head(stored):
    return {
        "lm_head.weight" if name == "model.embed_tokens.weight" else name: tensor
        for name, tensor in stored.items()
    }


def _with_head(stored, factor: float = 1.0):
    return stored | {"lm_head.weight": stored["model.embed_tokens.weight"] * factor}


@pytest.mark.parametrize(
    ("change", "is_tied", "note"),
    [
        (_with_head, True, None),
        (lambda stored: _with_head(stored, 1.5), False, "both are used"),
        (_only_head, True, "is the embedding as well"),
    ],
)
def test_a_tied_flag_and_a_head_of_its_own(change, is_tied, note, tmp_path: Path):
    """The model is what transformers makes of the folder, before and after."""
    _two_heads(tmp_path / "in", change)
    state = read_hf(tmp_path / "in")
    assert ("output_layer.weight" not in state.weights) == is_tied
    assert state.config.model.untie_embeddings_and_output_weights != is_tied
    assert (note is None and not state.notes) or note in state.notes[0]
    (tmp_path / "out").mkdir()
    write_hf(state, tmp_path / "out")
    expected, back = (
        hf_logits(tmp_path / folder, torch.float32, TOKENS) for folder in ("in", "out")
    )
    assert torch.equal(expected, back)


def _frequencies(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The rotary frequencies that transformers computes, as old versions stored them."""
    made = save_hf_model(name, folder).model.rotary_emb.inv_freq
    names = ("model.rotary_emb", *(f"model.layers.{n}.self_attn.rotary_emb" for n in range(2)))
    return {f"{n}.inv_freq": made.clone() for n in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "llama3", "qwen3"])
def test_stored_frequencies_are_compared(name, dtype, tmp_path: Path):
    more = {n: t.to(dtype) for n, t in _frequencies(tmp_path, name).items()}
    stored = load_file(tmp_path / "model.safetensors")
    save_file(stored | more, tmp_path / "model.safetensors", {"format": "pt"})
    assert read_hf(tmp_path).weights
    wrong = dict(more)
    wrong["model.layers.1.self_attn.rotary_emb.inv_freq"][3] *= 1.1
    save_file(stored | wrong, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="layers.1.self_attn.rotary_emb.*other rotary"):
        read_hf(tmp_path)


def test_every_entry_of_a_configuration_is_accounted_for(tmp_path: Path):
    """Unknown ones without effect are left alone, and a training's is said."""
    save_hf_model("llama", tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    harmless = {"attn_logit_softcapping": None, "use_new_thing": False, "attention_dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(values | harmless))
    (note,) = read_hf(tmp_path).notes
    assert "attention_dropout 0.1" in note


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("llama", {"model_type": "gpt_neox"}, ("gpt_neox", "llama, mistral")),
        ("llama", {"model_type": None}, ("model_type None",)),
        ("llama", {"hidden_act": "gelu"}, ("hidden_act gelu", "silu")),
        ("llama", {"attention_bias": True}, ("attention_bias True", "mlp_bias False")),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4}}, ("yarn", "llama3")),
        ("llama", {"rope_parameters": {"rope_theta": 10000.5}}, ("rope_theta 10000.5",)),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, ("rope_type linear",)),
        ("qwen2", {"rope_parameters": {"full_attention": {}}}, ("full_attention", "alike")),
        (
            "llama",
            {"partial_rotary_factor": None, "rope_parameters": {"partial_rotary_factor": 0.5}},
            ("partial_rotary_factor",),
        ),
        ("llama", {"attn_logit_softcapping": 50.0}, ("attn_logit_softcapping 50.0", "remove")),
        ("llama", {"quantization_config": {"bits": 4}}, ("quantization_config",)),
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, ("linear_attention",)),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 4]}},
            ("mrope_section",),
        ),
        ("llama", {"rope_theta": 7.0}, ("rope_theta 7.0 and", "transformers 5 takes")),
        ("llama", {"num_hidden_layers": 3}, ("model.layers.2.", "lacks")),
        ("llama", {"num_hidden_layers": 10**12}, ("--num-layers is 1000000000000", "at most 1024")),
        ("llama", {"hidden_size": "64"}, ("does not describe a model",)),
        ("llama", {"num_hidden_layers": 1}, ("model.layers.1.", "nothing is known")),
        ("llama", {"num_key_value_heads": 4}, ("do not have the shapes", "q_proj")),
        ("llama", {"num_hidden_layers": "many"}, ("--num-layers is 'many'",)),
        ("llama", {"num_attention_heads": 0}, ("does not describe a model",)),
        ("qwen3", {"attention_bias": True}, ("attention_bias",)),
        ("qwen2", {"model_type": "llama"}, ("q_proj.bias", "nothing is known")),
    ],
)
def test_what_is_not_built_is_refused(name, changes, parts, tmp_path: Path):
    save_hf_model(name, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(CheckpointError) as caught:
        state = read_hf(tmp_path)
        read_all(state.weights)
    for part in parts:
        assert part in str(caught.value)


def test_a_model_whose_logits_are_nan_is_told(tmp_path: Path):
    """Equal bits, and no logits that could be compared: neither verified nor another model."""
    save_hf_model("llama", tmp_path / "llama")
    stored = load_file(tmp_path / "llama" / "model.safetensors")
    stored["model.norm.weight"][0] = float("nan")
    save_file(stored, tmp_path / "llama" / "model.safetensors", {"format": "pt"})
    told = conversion("hf", tmp_path / "llama", "megatron", tmp_path / "out", verify=True)
    with pytest.raises(CheckpointError, match="no finite numbers"):
        convert(told, print)


def test_missing_shard_is_named(tmp_path: Path):
    save_hf_model("llama", tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        read_hf(tmp_path)


@pytest.mark.parametrize("size", ["5", "0GB", "5 GiB", "many"])
def test_size_of_files_that_cannot_be(size: str, tmp_path: Path):
    with pytest.raises(ConfigurationError, match=f"--max-shard-size {size}"):
        conversion("hf", tmp_path, "hf", tmp_path, max_shard_size=size)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_family_that_has_no_such_model(family: str, tmp_path: Path):
    save_hf_model("qwen2", tmp_path)
    with pytest.raises((CheckpointError, ConfigurationError), match=f"--hf-model-type {family}"):
        write_hf(read_hf(tmp_path), tmp_path, model_type=family)


def test_settings_that_a_family_ignores_or_presumes(tmp_path: Path):
    """transformers' Mistral slides over all layers whatever layer_types says, and has 8 groups
    where none are said."""
    save_hf_model("mistral", tmp_path)
    path = tmp_path / "config.json"
    said = json.loads(path.read_text())
    for ignored in ({"layer_types": ["full_attention"] * 2}, {"use_sliding_window": False}):
        path.write_text(json.dumps(said | ignored))
        assert read_hf(tmp_path).config.model.max_position_embeddings == 50
    for family, name, expected in (
        ("mistral", "num_key_value_heads", 8),
        ("qwen2", "num_key_value_heads", 32),
        ("qwen3", "head_dim", 128),
        ("llama", "num_key_value_heads", None),
    ):
        values = {"model_type": family, "num_attention_heads": 4, "hidden_size": 64}
        assert _with_defaults(values).get(name) == expected
