"""The checkpoints of the paper's public reference, a fork of Meta's lingua.

    0000000024/.metadata, __0_0.distcp      torch.distributed.checkpoint: model.*, optim.*
    0000000024/params.json                  the run's configuration
    0000000024/train_state_00000.json       its position
    0000000024/consolidated/                consolidated.pth, all in one file, and params.json

Written from the files' own content and PyTorch's documentation: nothing here is the reference's.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_memory.config import Config
from megatron_memory.config.pools import memory_pools
from megatron_memory.conversion.dcp_files import StoredTensors, write_dcp
from megatron_memory.conversion.decoder import (
    MEMORY_TABLES,
    DecoderNames,
    check_is_like_llama,
    decoder_rules,
    memory_linear_layers,
    memory_prefix,
)
from megatron_memory.conversion.lazy import LazyTensor, from_memory
from megatron_memory.conversion.lingua_groups import groups_of
from megatron_memory.conversion.lingua_params import config_of, params_of
from megatron_memory.conversion.links import check_checkpoint_links
from megatron_memory.conversion.rules import Rule, same, to_ours, to_theirs, twins
from megatron_memory.conversion.saved_state import SavedState, Tensors, Twin
from megatron_memory.conversion.shapes import check_shapes
from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.documents import read_json
from megatron_memory.reading.pickles import UnsafeFile
from megatron_memory.reading.torch_files import load_torch_file
from megatron_memory.training.checkpoint.integrity import check_stored
from megatron_memory.training.checkpoint.metadata_file import read_metadata

PARAMS = "params.json"
CONSOLIDATED = "consolidated.pth"
_STATE_FILE = "train_state_00000.json"
_ITERATION = re.compile(r"\d{10}")
_MODEL, _OPTIMIZER = "model.", "optim.state."
_GROUPS = "optim.param_groups."
_MOMENTS, _STEP = ("exp_avg", "exp_avg_sq"), "step"

_NAMES = DecoderNames(
    embedding="tok_embeddings.weight",
    final_norm="norm.weight",
    output="output.weight",
    layer="layers.{}.",
    queries="attention.wq",
    keys="attention.wk",
    values="attention.wv",
    projection="attention.wo",
    attention_norm="attention_norm.weight",
    mlp_norm="ffn_norm.weight",
    gate="feed_forward.w1",
    up="feed_forward.w3",
    down="feed_forward.w2",
    rotates_pairs=True,
)
_LINEAR = {
    "router.query": "query_proj.query_mlps.0",
    "linear_fc1": "swilu_projection",
    "linear_fc2": "value_proj",
    "gate": "gating",
}


def lingua_rules(config: Config) -> list[Rule]:
    """The rules of a model.

    Raises:
        CheckpointError: the reference has no such model.
    """
    check_is_like_llama(config, "lingua")
    _check_memory(config)
    return list(decoder_rules(config, _NAMES, _memory_rules))


def _check_memory(config: Config) -> None:
    memory, pools = config.memory, memory_pools(config)
    unlike = {
        "--memory-qk-norm": memory.qk_norm,
        "--memory-softmax-sink": memory.softmax_sink,
        "--memory-beside-mlp": memory.beside_mlp,
        # It knows one table for all layers, or one for each.
        "several tables, some of them of several layers (--memory-share-groups),": (
            len(pools) > 1 and any(len(pool.layers) > 1 for pool in pools)
        ),
    }
    found = [flag for flag, is_so in unlike.items() if is_so and memory.enabled]
    model = config.model
    if model.use_rope_scaling:
        found.append("--use-rope-scaling")
    if model.add_qkv_bias or not model.disable_bias_linear:
        found.append("biases in attention or MLPs")
    if found:
        raise CheckpointError(
            f"--to lingua: the model has {' and '.join(found)}, which the reference lacks. It "
            "cannot be converted"
        )


def _memory_rules(config: Config, layer: int) -> Iterator[Rule]:
    memory = config.memory
    ours, theirs = memory_prefix(config, layer), f"layers.{layer}.feed_forward."
    shape = (memory.num_heads, 2, memory.num_half_keys, memory.key_dim // 2)
    yield Rule(
        ours=f"{ours}router.keys",
        theirs=(f"{theirs}keys",),
        join=lambda parts: parts[0].reshape(shape),
        split=lambda keys: [keys.reshape(-1, shape[-1])],
    )
    for our_name, their_name in _LINEAR.items():
        if our_name in memory_linear_layers(config):
            for kind in ("weight", "bias"):
                yield same(f"{ours}{our_name}.{kind}", f"{theirs}{their_name}.{kind}")
    for pool in memory_pools(config):
        if pool.layers[0] == layer:
            for table in MEMORY_TABLES[memory.variant]:
                names = [f"layers.{reader}.feed_forward.{table}.weight" for reader in pool.layers]
                yield same(f"memory.{pool.name}.{table}.weight", *names)


def read_lingua_back(save: Path, config: Config) -> tuple[Tensors, dict[str, Tensors]]:
    """Weights and moments of what `write_lingua` wrote, by the rules that it was written with.

    Raises:
        CheckpointError: something is missing, left over or damaged.
    """
    folder = locate_lingua(save)
    rules, stored = lingua_rules(config), stored_tensors(folder)
    moments = {kind: _moments(rules, stored, kind, folder) for kind in _MOMENTS}
    return (
        to_ours(rules, _under(stored, _MODEL), folder),
        {kind: found for kind, found in moments.items() if found},
    )


def read_lingua(load: Path) -> SavedState:
    """A run's directory (its newest checkpoint), a checkpoint's folder, or a consolidated one.

    Raises:
        CheckpointError: there is none, it is damaged, or a setting has no equal here.
    """
    folder = locate_lingua(load)
    check_checkpoint_links(load, folder)
    params = read_json(folder / PARAMS, CheckpointError)
    stored = stored_tensors(folder)
    weights = _under(stored, _MODEL)
    vocab = weights.get(_NAMES.embedding)
    if vocab is None:
        raise CheckpointError(f"{folder} lacks {_MODEL}{_NAMES.embedding}: it is no lingua model")
    config = config_of(params, weights, folder / PARAMS)
    _check_vocabulary(params, vocab.num_rows, folder)
    _check_accounted(stored, folder)
    rules = lingua_rules(config)
    theirs = _with_copies(rules, weights)
    weights = to_ours(rules, theirs, folder)
    check_shapes(config, vocab.num_rows, weights, folder)
    moments = {kind: _moments(rules, stored, kind, folder) for kind in _MOMENTS}
    for found in moments.values():
        check_shapes(config, vocab.num_rows, found, folder)
    step = _step(stored, folder)
    return SavedState(
        config=config,
        vocab_size=vocab.num_rows,
        weights=weights,
        twins=(*twins(rules, theirs), *_moment_twins(rules, stored)),
        moments={kind: found for kind, found in moments.items() if found},
        iteration=step,
        consumed_samples=step * config.training.global_batch_size,
        notes=_notes(config, stored),
    )


def locate_lingua(load: Path) -> Path:
    """The folder of the checkpoint that a path means: the newest of a run.

    Raises:
        CheckpointError: there is none.
    """
    if (load / PARAMS).is_file():
        return load
    runs = load / "checkpoints" if (load / "checkpoints").is_dir() else load
    saved = sorted(p for p in runs.glob("*") if _ITERATION.fullmatch(p.name))
    if not saved:
        raise CheckpointError(
            f"--load {load}: holds no {PARAMS}, and no checkpoint of lingua. Give the folder of "
            "one, such as checkpoints/0000010000"
        )
    return saved[-1]


def stored_tensors(folder: Path) -> Tensors:
    """All tensors of a checkpoint's folder, as in the sharded files: model.*, optim.*.

    Raises:
        CheckpointError: its list of tensors is missing or damaged, or holds code.
    """
    path = folder / CONSOLIDATED
    if not path.is_file():
        metadata = read_metadata(folder)
        check_stored(folder, metadata)
        return StoredTensors(folder, metadata).tensors()
    try:
        loaded = load_torch_file(path, mmap=True)
    except (UnsafeFile, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read, or holds code: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: holds no tensors by name")
    # Without the optimizer's part it is the model's tensors themselves.
    parts = loaded if isinstance(loaded.get("model"), dict) else {"model": loaded}
    return {key: from_memory(tensor) for key, tensor in _flat(parts, "")}


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))


def _under(stored: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}


def _with_copies(rules: list[Rule], theirs: Tensors) -> Tensors:
    """A shared table may stand under any of its layers."""
    found = dict(theirs)
    for rule in rules:
        name = rule.theirs[0]
        for copy in rule.copies:
            if name not in found and copy in found:
                found[name] = found[copy]
    return found


def _moments(rules: list[Rule], stored: Tensors, kind: str, folder: Path) -> Tensors:
    states = _states(stored, kind)
    return to_ours(rules, _with_copies(rules, states), folder) if states else {}


def _states(stored: Tensors, kind: str) -> Tensors:
    ending = f".{kind}"
    return {
        name.removesuffix(ending): tensor
        for name, tensor in _under(stored, _OPTIMIZER).items()
        if name.endswith(ending)
    }


def _moment_twins(rules: list[Rule], stored: Tensors) -> Iterator[Twin]:
    """The states of a shared table that are stored with several of its layers."""
    for kind in _MOMENTS:
        for name, one, another in twins(rules, _with_copies(rules, _states(stored, kind))):
            yield f"{kind} of {name}", one, another


def _check_vocabulary(params: dict[str, Any], rows: int, folder: Path) -> None:
    said = params["model"].get("vocab_size")
    if isinstance(said, int) and said > 0 and said != rows:
        raise CheckpointError(
            f"{folder / PARAMS}: vocab_size {said}, and the embedding has {rows} rows. Correct it"
        )


def _check_accounted(stored: Tensors, folder: Path) -> None:
    """That no tensor is of a kind which nothing here reads.

    Raises:
        CheckpointError: names those that are.
    """
    endings = tuple(f".{kind}" for kind in (*_MOMENTS, _STEP))
    unknown = sorted(
        name
        for name in stored
        if not name.startswith(_MODEL)
        and not (name.startswith(_OPTIMIZER) and name.endswith(endings))
        and not name.startswith(_GROUPS)
    )
    if unknown:
        raise CheckpointError(
            f"{folder} holds {', '.join(unknown[:8])}, of which nothing is known: it is damaged, "
            "or of another version of the reference"
        )


def _step(stored: Tensors, folder: Path) -> int:
    """Updates taken, of which the optimizer keeps a count for each parameter.

    Raises:
        CheckpointError: the counts do not agree, or are none.
    """
    state_file, step = folder / _STATE_FILE, _step_of(folder)
    counts = {_count(name, tensor, folder) for name, tensor in _states(stored, _STEP).items()}
    if state_file.is_file():
        counts.add(_saved_step(state_file, step))
    if len(counts) > 1:
        raise CheckpointError(
            f"{folder}: the optimizer's states and {_STATE_FILE} count different steps, "
            f"{', '.join(map(str, sorted(counts)))}: the files are of several checkpoints"
        )
    return counts.pop() if counts else step


def _count(name: str, tensor: LazyTensor, folder: Path) -> int:
    count = tensor.read().item() if math.prod(tensor.shape) == 1 else None
    if count is None or not 0 <= count < 2**63 or count != int(count):
        raise CheckpointError(f"{folder}: {_OPTIMIZER}{name}.{_STEP} is no number of steps")
    return int(count)


def _saved_step(path: Path, expected: int) -> int:
    """The position that a file says, which must be its folder's."""
    step = read_json(path, CheckpointError).get("step", expected)
    if type(step) is not int or not 0 <= step < 2**63:
        raise CheckpointError(
            f"{path}: step is {step!r:.80}, and must be a whole number, 0 or more"
        )
    if expected and step != expected:
        raise CheckpointError(
            f"{path}: says step {step}, and its folder is named after step {expected}. Give the "
            "folder its own name, or copy the checkpoint again"
        )
    return step


def _step_of(folder: Path) -> int:
    name = folder.parent.name if folder.name == "consolidated" else folder.name
    return int(name) if _ITERATION.fullmatch(name) else 0


def _notes(config: Config, stored: Tensors) -> tuple[str, ...]:
    notes = []
    if not any(name.startswith(_OPTIMIZER) for name in stored):
        notes.append("the checkpoint holds no optimizer state: train from it with --finetune")
    if config.data.tokenizer_type is None:
        notes.append("the tokenizer is not part of the checkpoint: give --tokenizer-model to train")
    return tuple(notes)


def write_lingua(state: SavedState, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint's folder as the reference's own, without the consolidated file, which its
    evaluation makes by itself.

    Args:
        state: what to write.
        folder: where to, empty.
        dtype: of the weights; None: as they are.

    Raises:
        CheckpointError, OSError: the reference has no such model, or the folder cannot be written.
    """
    rules = lingua_rules(state.config)
    iteration = folder / "checkpoints" / f"{state.iteration:010d}"
    iteration.mkdir(parents=True)
    # The optimizer works on the weights themselves there: the exact ones go along with it.
    is_exact = dtype == torch.float32 or (dtype is None and bool(state.moments))
    source = state.exact_weights if is_exact else state.weights
    weights = to_theirs(rules, source, "the model")
    tensors = {_MODEL + n: t.to(dtype or t.dtype, n) for n, t in weights.items()}
    objects: dict[str, Any] = {}
    if set(state.moments) == set(_MOMENTS):
        tensors |= _states_of(state, rules)
        objects = groups_of(state.config, state.iteration, _trained(rules))
    write_dcp(iteration, tensors, objects)
    _write_json(iteration / PARAMS, params_of(state.config, state.vocab_size))
    position = {"step": state.iteration, "acc_step": 0, "data_loader_state": {}}
    position["scheduler"] = {"last_epoch": state.iteration}
    _write_json(iteration / _STATE_FILE, position)


def _states_of(state: SavedState, rules: list[Rule]) -> Tensors:
    step = from_memory(torch.tensor(float(state.iteration)))
    tensors = {f"{_OPTIMIZER}{name}.step": step for name in _trained(rules)}
    for kind, moments in state.moments.items():
        theirs = to_theirs(rules, moments, "the optimizer's state")
        for name in _trained(rules):
            tensors[f"{_OPTIMIZER}{name}.{kind}"] = theirs[name]
    return tensors


def _trained(rules: list[Rule]) -> list[str]:
    """Names of the parameters, a shared one's once."""
    return [name for rule in rules for name in rule.theirs]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
