"""The rules of a Llama-like decoder: everything but the memory layers' own tensors."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial

import torch
from torch import Tensor

from megatron_memory.config import Config
from megatron_memory.config.pools import memory_layers
from megatron_memory.conversion.attention import (
    fuse_qkv,
    halves_to_pairs,
    pairs_to_halves,
    split_qkv,
)
from megatron_memory.conversion.rules import Rule, same
from megatron_memory.exceptions import CheckpointError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderNames:
    """What another format calls a decoder's tensors."""

    embedding: str
    final_norm: str
    output: str
    layer: str
    """Prefix of a layer's, with {} for its number."""
    queries: str
    keys: str
    values: str
    projection: str
    attention_norm: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    query_norm: str | None = None
    key_norm: str | None = None
    rotates_pairs: bool
    """Whether rotary embeddings turn adjacent pairs of channels, not the two halves."""


MEMORY_TABLES = {"pkm": ("values",), "memory+": ("values",), "peer": ("values_u", "values_v")}
"""The tables of a pool, by the memory's variant."""

MemoryRules = Callable[[Config, int], Iterator[Rule]]
"""(configuration, layer) to the rules of a memory layer, without its norm."""


def check_is_like_llama(config: Config, format_name: str) -> None:
    """Refuse a model that other formats cannot say.

    Raises:
        CheckpointError: names the setting.
    """
    model = config.model
    unlike = {
        f"--normalization {model.normalization}": model.normalization != "RMSNorm",
        "an MLP without --swiglu": not model.swiglu,
        f"--position-embedding-type {model.position_embedding_type}": (
            model.position_embedding_type != "rope"
        ),
        f"--rotary-percent {model.rotary_percent}": model.rotary_percent != 1,
        f"--num-experts {model.num_experts}": bool(model.num_experts),
    }
    found = [text for text, is_so in unlike.items() if is_so]
    if found:
        raise CheckpointError(
            f"--to {format_name}: the model has {' and '.join(found)}, which that format's "
            "Llama-like models do not have. It cannot be converted"
        )


def check_size(config: Config, stored: Sized) -> None:
    """Refuse a number of layers that is damaged, before lists of as many are made.

    Raises:
        CheckpointError: there are fewer tensors than layers.
    """
    if config.model.num_layers > len(stored):
        raise CheckpointError(
            f"there are {len(stored)} tensors, too few for {config.model.num_layers} layers"
        )


def decoder_rules(config: Config, names: DecoderNames, of_memory: MemoryRules) -> Iterator[Rule]:
    """All rules of a model."""
    model, with_memory = config.model, memory_layers(config)
    yield same("embedding.word_embeddings.weight", names.embedding)
    yield same("decoder.final_layernorm.weight", names.final_norm)
    if model.untie_embeddings_and_output_weights:
        yield same("output_layer.weight", names.output)
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", names.layer.format(layer)
        yield from _attention_rules(config, names, ours, theirs)
        if layer in with_memory:
            yield same(f"{ours}pre_mlp_layernorm.weight", theirs + names.mlp_norm)
            yield from of_memory(config, layer)
        else:
            yield same(f"{ours}mlp.linear_fc1.layer_norm_weight", theirs + names.mlp_norm)
        if layer not in with_memory or config.memory.beside_mlp:
            yield from _mlp_rules(config, names, ours, theirs)


def memory_prefix(config: Config, layer: int) -> str:
    """What our names of a memory layer's own tensors begin with."""
    return f"decoder.layers.{layer}.mlp." + ("memory." if config.memory.beside_mlp else "")


def memory_linear_layers(config: Config) -> set[str]:
    """The linear layers of a memory layer, by our names."""
    memory = config.memory
    projects = memory.variant == "memory+" or (
        memory.variant == "pkm" and memory.value_dim != config.model.hidden_size
    )
    layers = {"router.query"} | ({"linear_fc2"} if projects else set())
    layers |= {"linear_fc1"} if memory.variant == "memory+" else set()
    return layers | ({"gate"} if memory.gated else set())


def _attention_rules(config: Config, names: DecoderNames, ours: str, theirs: str) -> Iterator[Rule]:
    model = config.model
    attention = f"{ours}self_attention."
    yield same(f"{attention}linear_qkv.layer_norm_weight", theirs + names.attention_norm)
    for kind in _kinds(not model.disable_bias_linear or model.add_qkv_bias):
        yield Rule(
            ours=f"{attention}linear_qkv.{kind}",
            theirs=tuple(f"{theirs}{n}.{kind}" for n in (names.queries, names.keys, names.values)),
            join=partial(_fuse, config, names),
            split=partial(_split, config, names),
        )
    for kind in _kinds(not model.disable_bias_linear):
        yield same(f"{attention}linear_proj.{kind}", f"{theirs}{names.projection}.{kind}")
    if model.qk_layernorm:
        for norm, name in (("q_layernorm", names.query_norm), ("k_layernorm", names.key_norm)):
            if name is None:
                raise CheckpointError("--qk-layernorm: that format's models have no such norms")
            yield Rule(
                ours=f"{attention}{norm}.weight",
                theirs=(theirs + name,),
                join=lambda parts: _from_theirs(config, names, parts[0]),
                split=lambda part: [_to_theirs(config, names, part)],
            )


def _mlp_rules(config: Config, names: DecoderNames, ours: str, theirs: str) -> Iterator[Rule]:
    for kind in _kinds(not config.model.disable_bias_linear):
        yield Rule(
            ours=f"{ours}mlp.linear_fc1.{kind}",
            theirs=(f"{theirs}{names.gate}.{kind}", f"{theirs}{names.up}.{kind}"),
            join=lambda parts: torch.cat(tuple(parts)),
            split=lambda fused: fused.chunk(2),
        )
        yield same(f"{ours}mlp.linear_fc2.{kind}", f"{theirs}{names.down}.{kind}")


def _kinds(has_bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if has_bias else ("weight",)


def _fuse(config: Config, names: DecoderNames, parts: Sequence[Tensor]) -> Tensor:
    q, k, v = parts
    turned = (_from_theirs(config, names, q), _from_theirs(config, names, k), v)
    return fuse_qkv(turned, config.model.num_query_groups, config.model.kv_channels)


def _split(config: Config, names: DecoderNames, fused: Tensor) -> Sequence[Tensor]:
    q, k, v = split_qkv(fused, config.model.num_query_groups, config.model.kv_channels)
    return _to_theirs(config, names, q), _to_theirs(config, names, k), v


def _from_theirs(config: Config, names: DecoderNames, rows: Tensor) -> Tensor:
    if names.rotates_pairs == config.model.rotary_interleaved:
        return rows
    turn = pairs_to_halves if names.rotates_pairs else halves_to_pairs
    return turn(rows, config.model.kv_channels)


def _to_theirs(config: Config, names: DecoderNames, rows: Tensor) -> Tensor:
    if names.rotates_pairs == config.model.rotary_interleaved:
        return rows
    turn = halves_to_pairs if names.rotates_pairs else pairs_to_halves
    return turn(rows, config.model.kv_channels)
