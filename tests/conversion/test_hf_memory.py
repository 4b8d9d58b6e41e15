"""Memory models in Hugging Face's format: the same logits and the same bits on either side.

fp32 against fp32; only the order of sums differs. Logits here are sums of some 10^2 products, four
layers deep: 1e-5 of the largest is 20 times what was measured, and far below what one wrong row,
head or rotation causes.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_memory.conversion.hf import load_for_evaluation, read_hf, read_hf_back, write_hf
from megatron_memory.conversion.hf_card import model_card
from megatron_memory.conversion.hf_memory import join_tables
from megatron_memory.conversion.lazy import from_memory
from megatron_memory.conversion.safetensors_files import read_weight_files
from megatron_memory.exceptions import CheckpointError, ConfigurationError
from megatron_memory.inference.engine import InferenceEngine
from megatron_memory.inference.options import Sampling
from tests.conversion.memory_models import CASES, VOCAB, build_case
from tests.tiny import SEQUENCE, one_rank

__all__ = ["one_rank"]

TOLERANCE = 1e-5
PROMPT, NEW_TOKENS = 6, 8
TEXT = "The currency code of"
PROGRAM = Path(__file__).with_name("hf_program.py")


@dataclasses.dataclass
class Exported:
    """A case on both sides."""

    state: object
    folder: Path
    logits: torch.Tensor
    continued: list[list[int]]
    answer: dict


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, SEQUENCE), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def exported(one_rank, tokens, tmp_path_factory) -> dict[str, Exported]:
    """Every case, exported and used by one program that has none of our packages."""
    root = tmp_path_factory.mktemp("exported")
    cases = {}
    for name in CASES:
        model, state = build_case(name)
        folder = root / name
        folder.mkdir()
        # Files of 4 kB: tables of several parameters, and an index.
        write_hf(state, folder, max_shard_bytes=4000 if name == "peer" else 5 * 10**9)
        positions = torch.arange(SEQUENCE).expand_as(tokens)
        with torch.inference_mode():
            logits = model(tokens, positions, None)
        cases[name] = Exported(state, folder, logits, _continue(model, tokens), {})
    answers = _run_program(root, tokens)
    for name, case in cases.items():
        case.answer = answers[str(root / name)]
    return cases


def _continue(model, tokens) -> list[list[int]]:
    engine = InferenceEngine(model, vocab_size=VOCAB, padded_vocab_size=VOCAB, stop_tokens=())
    prompts = tokens[:, :PROMPT].tolist()
    new = engine.run(prompts, NEW_TOKENS, Sampling(greedy=True), max_batch_size=4)
    return [[*prompt, *added] for prompt, added in zip(prompts, new, strict=True)]


def _run_program(root: Path, tokens: torch.Tensor) -> dict:
    asked = {
        "folders": [str(root / name) for name in CASES],
        "tokens": tokens.tolist(),
        "prompt_tokens": PROMPT,
        "new_tokens": NEW_TOKENS,
        "text": TEXT,
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(root / "home"),
        "HF_MODULES_CACHE": str(root / "modules"),
    }
    result = subprocess.run(
        [sys.executable, "-I", str(PROGRAM), json.dumps(asked)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_our_logits(name, exported):
    case = exported[name]
    theirs = torch.load(case.folder / "logits.pt")
    error = (theirs - case.logits).abs().max() / case.logits.abs().max()
    assert error < TOLERANCE, f"off by {error:.2e} of the largest logit"
    assert case.answer["dtype"] == "torch.float32"


@pytest.mark.parametrize("name", CASES)
def test_transformers_continues_as_our_generator_does(name, exported):
    case = exported[name]
    assert case.answer["cached"] == case.continued
    assert case.answer["uncached"] == case.continued


def test_the_pipeline_continues_a_text(exported):
    text = exported["pkm"].answer["text"]
    assert text.startswith(TEXT)
    assert len(text) > len(TEXT)


@pytest.mark.parametrize("name", CASES)
def test_the_way_back_gives_the_same_bits_and_the_same_model(name, exported):
    state, folder = exported[name].state, exported[name].folder
    back = read_hf_back(folder, state.config)
    assert back.keys() == state.weights.keys()
    for weight, tensor in state.weights.items():
        assert torch.equal(back[weight].read(), tensor.read()), weight
    found = read_hf(folder)
    assert found.weights.keys() == state.weights.keys()
    assert found.vocab_size == VOCAB
    # Exported models rotate halves, whatever ours did.
    model = dataclasses.replace(state.config.model, rotary_interleaved=False)
    assert found.config.model == model
    assert dataclasses.replace(found.config.memory, **_of_training(state)) == state.config.memory


def _of_training(state) -> dict:
    return {name: getattr(state.config.memory, name) for name in ("value_lr", "value_min_lr")}


def test_the_card_says_what_it_is(exported):
    state = dataclasses.replace(exported["pkm"].state, iteration=24, consumed_samples=192)
    card = model_card(state, torch.float32, has_tokenizer=False)
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "text-generation"
    assert "license" not in header
    total = sum(tensor.read().numel() for tensor in state.weights.values())
    # The table: 64 rows of 32.
    assert f"| parameters | {total:,}, of which 2,048 in tables |" in card
    assert "layers 1, 3 (counted from 0) have\na memory in the MLP's place" in card
    assert "| optimizer steps | 24 |" in card
    assert f"| training data | {192 * SEQUENCE:,} tokens" in card
    assert "No tokenizer" in card
    written = (exported["pkm"].folder / "README.md").read_text()
    assert "No tokenizer" not in written and "optimizer steps" not in written


def test_a_table_larger_than_a_file_is_several_parameters(exported):
    index = json.loads((exported["peer"].folder / "model.safetensors.index.json").read_text())
    chunks = [name for name in index["weight_map"] if ".chunks." in name]
    # 64 rows of 32 fp32 in parts of at most 4000 bytes: 3 of 22, 22 and 20 rows; two tables.
    assert len(chunks) == 6
    name = "memory.shared.values_v.weight"
    table, state = read_hf(exported["peer"].folder).weights[name], exported["peer"].state
    for begin, end in ((0, 1), (5, 41), (22, 44), (43, 64)):
        rows = state.weights[name].read_rows(begin, end)
        assert torch.equal(table.read_rows(begin, end), rows)
    sizes = {p.stat().st_size for p in exported["peer"].folder.glob("*.safetensors")}
    assert max(sizes) < 4096 * 32 * 4 + 4096


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", ["memory_llama"]),
        ("memory_layers", [1, 1]),
        ("memory_layers", [1, 9]),
        ("memory_layers", 3),
        ("memory_variant", "memory"),
        ("memory_share_scope", "stage"),
        ("memory_share_groups", [[1], [2]]),
        ("memory_top_k", 9),
        ("memory_num_half_keys", 10**6),
        ("memory_num_half_keys", 16),
        ("memory_gated", "yes"),
        ("memory_value_dim", 2**60),
    ],
)
def test_a_damaged_configuration_is_refused(name, value, exported, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(exported["memory+"].folder, folder)
    values = json.loads((folder / "config.json").read_text())
    scope = {"memory_share_scope": "stage"} if name == "memory_share_groups" else {}
    (folder / "config.json").write_text(json.dumps(values | scope | {name: value}))
    with pytest.raises(CheckpointError, match="config"):
        read_hf(folder)


@pytest.mark.parametrize("name", ["memory+-with-all", "peer", "llama3-rope"])
def test_what_transformers_saves_is_read(name, exported, tmp_path):
    """In the spelling of its present version, which differs from the exported one."""
    case = exported[name]
    load_for_evaluation(case.folder).save_pretrained(tmp_path, max_shard_size="100KB")
    back = read_hf(tmp_path)
    assert back.config.model == case.state.config.model
    assert dataclasses.replace(back.config.memory, **_of_training(case.state)) == (
        case.state.config.memory
    )
    for weight, tensor in case.state.weights.items():
        assert torch.equal(back.weights[weight].read(), tensor.read()), weight


def test_bf16(exported, tmp_path):
    state = exported["memory+"].state
    write_hf(state, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "| type of the weights | bfloat16 |" in (tmp_path / "README.md").read_text()
    back = read_hf(tmp_path)
    assert back.config.precision.bf16
    for weight, tensor in state.weights.items():
        assert torch.equal(back.weights[weight].read(), tensor.read().bfloat16()), weight


@pytest.mark.parametrize("damage", ["missing", "other rows"])
def test_a_table_with_wrong_parts_is_refused(damage, exported):
    case = exported["peer"]
    stored = read_weight_files(case.folder)
    name = "model.memory_tables.shared.values_u.chunks.1.weight"
    part = stored.pop(name)
    if damage == "other rows":
        stored[name] = from_memory(part.read()[:-1])
    with pytest.raises(CheckpointError, match=r"values_u has parts"):
        join_tables(stored, case.state.config, case.folder)


def test_a_memory_model_is_of_no_other_family(exported, tmp_path):
    with pytest.raises(ConfigurationError, match="--hf-model-type llama: .* memory"):
        write_hf(exported["memory+"].state, tmp_path, model_type="llama")


def test_heads_that_llama_refuses_are_refused_here(exported, tmp_path):
    state = exported["like-qwen3"].state
    model = dataclasses.replace(state.config.model, num_attention_heads=6)
    state = dataclasses.replace(state, config=dataclasses.replace(state.config, model=model))
    with pytest.raises(CheckpointError, match="--num-attention-heads 6"):
        write_hf(state, tmp_path)


def test_code_in_a_folder_is_not_run_here(exported, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(exported["memory+"].folder, folder)
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('ran the code of the folder')")
    read_hf(folder)
    with torch.inference_mode():
        logits = load_for_evaluation(folder)(torch.zeros(1, 2, dtype=torch.long)).logits
    assert logits.shape == (1, 2, VOCAB)
