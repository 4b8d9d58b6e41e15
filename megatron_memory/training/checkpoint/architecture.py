"""Whether a checkpoint holds the model that this run describes, from the configurations alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_memory.config import Config, load_config
from megatron_memory.config.flags import all_flags
from megatron_memory.config.pools import groups_text, memory_layers, memory_pools
from megatron_memory.exceptions import CheckpointError, ConfigurationError
from megatron_memory.training.checkpoint.folders import CONFIG_FILE

# What decides which tensors there are, their shapes, or what their numbers mean.
_MODEL = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "position_embedding_type",
    "rotary_percent",
    "rotary_interleaved",
    "normalization",
    "swiglu",
    "disable_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
    "num_experts",
)
_EXPERTS = ("moe_layer_freq", "moe_ffn_hidden_size")
_MEMORY = (
    "beside_mlp",
    "variant",
    "num_heads",
    "num_half_keys",
    "key_dim",
    "value_dim",
    "gated",
    "qk_norm",
    "softmax_sink",
)
# The same tensors fit, but the model computes something else: possible on purpose, so only said.
_COMPUTATION = (
    ("model", "rotary_base"),
    ("model", "use_rope_scaling"),
    ("model", "rope_scaling_factor"),
    ("model", "norm_epsilon"),
    ("memory", "top_k"),
    ("memory", "fp8_values"),
    ("model", "moe_router_topk"),
)


def decides_model(component: str, name: str) -> bool:
    """Whether a field of a configuration decides a model's tensors, or what it computes from them;
    which layers have and share tables is asked of `config.pools`."""
    fields = [("model", field) for field in (*_MODEL, *_EXPERTS)]
    return (component, name) in [*fields, *(("memory", field) for field in _MEMORY), *_COMPUTATION]


def saved_config(folder: Path) -> Config | None:
    """The configuration that wrote a checkpoint; None where another program did.

    Raises:
        CheckpointError: the file is there but cannot be read.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        return load_config(path)
    except ConfigurationError as error:
        raise CheckpointError(f"{path}: {error}") from error


def check_same_architecture(folder: Path, saved: Config, ours: Config) -> list[str]:
    """Compare two configurations' models.

    Returns:
        differences that change the computation but not the tensors, to be told.

    Raises:
        CheckpointError: the models differ in their tensors; names every setting that does.
    """
    differing = list(_differences(saved, ours))
    if differing:
        raise CheckpointError(
            f"{folder} holds a model of another architecture: {'; '.join(differing)}. Give "
            f"these flags the checkpoint's values (see {folder / CONFIG_FILE}), or load another one"
        )
    return [
        _difference(component, name, saved, ours)
        for component, name in _COMPUTATION
        if _value(saved, component, name) != _value(ours, component, name)
    ]


def _differences(saved: Config, ours: Config) -> Iterator[str]:
    names = [("model", name) for name in _MODEL]
    if saved.model.num_experts and ours.model.num_experts:
        names += [("model", name) for name in _EXPERTS]
    if ours.model.position_embedding_type == "learned_absolute":
        names.append(("model", "max_position_embeddings"))
    their_layers, our_layers = memory_layers(saved), memory_layers(ours)
    if their_layers != our_layers:
        yield f"--memory-layers {_listed(their_layers)} there, {_listed(our_layers)} here"
    elif our_layers:
        yield from _table_differences(saved, ours)
    if their_layers and our_layers:
        names += [("memory", name) for name in _MEMORY]
    for component, name in names:
        if _value(saved, component, name) != _value(ours, component, name):
            yield _difference(component, name, saved, ours)


def _table_differences(saved: Config, ours: Config) -> Iterator[str]:
    """Which layers share tables, however the flags say it."""
    theirs, mine = memory_pools(saved), memory_pools(ours)
    if theirs == mine:
        return
    if saved.memory.share_scope != ours.memory.share_scope:
        yield _difference("memory", "share_scope", saved, ours)
    else:
        yield f"--memory-share-groups {groups_text(theirs)} there, {groups_text(mine)} here"


def _listed(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers)) or "none"


def _difference(component: str, name: str, saved: Config, ours: Config) -> str:
    there, here = (_shown(_value(config, component, name)) for config in (saved, ours))
    return f"{_flag(component, name)} {there} there, {here} here"


def _value(config: Config, component: str, name: str) -> Any:
    return getattr(getattr(config, component), name)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _flag(component: str, name: str) -> str:
    return next(
        flag.spelled
        for flag in all_flags().values()
        if flag.component == component and flag.field.name == name
    )
