"""Do the settings that were written describe the same model?

Compared entry by entry with what was to be written, and once more by the model that a reader makes
of them: logits of a few tokens hardly depend on some (norm_epsilon, rotary_base), and not at all on
others (how many positions there are). Cheap whatever the model's size.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_memory.config import Config
from megatron_memory.config.flags import all_flags, flag_name
from megatron_memory.config.pools import memory_pools, mlp_layers
from megatron_memory.conversion.generation_settings import IN_CONFIG
from megatron_memory.conversion.hf import CONFIG, config_values, read_config, read_hf
from megatron_memory.conversion.hf_memory import check_code
from megatron_memory.conversion.lingua import PARAMS, locate_lingua, read_lingua
from megatron_memory.conversion.lingua_params import NOT_KEPT, params_of
from megatron_memory.conversion.megatron import config_to_write, layout_of
from megatron_memory.conversion.options import Target
from megatron_memory.conversion.own_tokenizer import count_ids
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.documents import read_json
from megatron_memory.training.checkpoint.architecture import decides_model, saved_config
from megatron_memory.training.checkpoint.finding import locate, read_common
from megatron_memory.training.checkpoint.folders import CONFIG_FILE

# Beside what decides the tensors and the computation.
_ALSO = (
    ("model", "max_position_embeddings"),
    ("memory", "num_random_values"),
    ("memory", "query_dropout"),
    ("memory", "value_dropout"),
)
# A conversion permutes rows instead, or writes a setting of trainings or experts, which none has.
_NOT_KEPT = (("model", "rotary_interleaved"), ("memory", "fp8_values"))


def check_settings_back(state: SavedState, target: Target, save: Path, dtype: torch.dtype) -> int:
    """Hold the settings in a folder that was written to those of the model.

    Args:
        state: what was written.
        target: how.
        save: its folder.
        dtype: of its weights.

    Returns:
        the number of settings compared.

    Raises:
        CheckpointError: names those that differ.
    """
    if target.target_format == "megatron":
        return _check_megatron(state, target, save, dtype)
    if target.target_format == "lingua":
        path = locate_lingua(save) / PARAMS
        expected = params_of(state.config, state.vocab_size)
        count = _check_entries(path, _dotted(expected), _dotted(read_json(path, CheckpointError)))
        back = read_lingua(save)
        _check_model(state, back, path, omitted=NOT_KEPT)
        step, found_step = ({"iteration": s.iteration} for s in (state, back))
        return count + _check_entries(path.parent, step, found_step)
    check_code(save, state.config)
    expected = config_values(state, target.hf_model_type, dtype, target.max_shard_bytes)
    found = {n: value for n, value in read_config(save).items() if n not in IN_CONFIG}
    count = _check_entries(save / CONFIG, _dotted(expected), _dotted(found))
    _check_model(state, read_hf(save), save / CONFIG)
    return count


def _check_megatron(state: SavedState, target: Target, save: Path, dtype: torch.dtype) -> int:
    folder = locate(save)
    config = None if folder is None else saved_config(folder)
    if folder is None or config is None:
        raise CheckpointError(f"--verify: {save} holds no checkpoint with its {CONFIG_FILE}")
    layout, ids = layout_of(target), count_ids(state)
    expected = config_to_write(state, Path(target.save), layout, dtype, ids)
    count = _check_entries(folder / CONFIG_FILE, _flat(expected), _flat(config))
    position = {name: getattr(state, name) for name in ("iteration", "consumed_samples")}
    position["vocab_size"] = state.vocab_size
    common = read_common(folder)
    found = {name: common.get(name) for name in position}
    return count + _check_entries(folder / "common.pt", position, found)


def _flat(config: Config) -> dict[str, Any]:
    return {
        key: getattr(getattr(config, flag.component), flag.field.name)
        for key, flag in all_flags().items()
    }


def _dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of tables within a table by names of their own, so that messages say which."""
    entries: dict[str, Any] = {}
    for name, value in values.items():
        inner = _dotted(value) if isinstance(value, dict) and value else None
        entries |= {name: value} if inner is None else {f"{name}.{n}": v for n, v in inner.items()}
    return entries


def _check_entries(path: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> int:
    differing = [name for name in expected if name not in found or expected[name] != found[name]]
    differing += [name for name in found if name not in expected]
    if differing:
        listed = ", ".join(
            f"{name} {found.get(name)!r:.60}, not {expected.get(name)!r:.60}" for name in differing
        )
        raise CheckpointError(f"--verify: {path} is not what was converted: {listed}")
    return len(expected)


def _check_model(
    state: SavedState, back: SavedState, path: Path, omitted: tuple[str, ...] = ()
) -> None:
    differing = list(_differing(state.config, back.config, omitted))
    if state.vocab_size != back.vocab_size:
        differing.append(f"{back.vocab_size} tokens, not {state.vocab_size}")
    if differing:
        raise CheckpointError(
            f"--verify: {path} describes another model than was converted: {', '.join(differing)}"
        )


def _differing(config: Config, back: Config, omitted: tuple[str, ...]) -> Iterator[str]:
    for key, flag in all_flags().items():
        component, name = flag.component, flag.field.name
        if not _is_compared(config, component, name) or name in omitted:
            continue
        wanted, found = (getattr(getattr(c, component), name) for c in (config, back))
        if wanted != found:
            yield f"{flag_name(key)} {found}, not {wanted}"
    wanted_pools, found_pools = (
        [pool.layers for pool in memory_pools(c)] if c.memory.enabled else []
        for c in (config, back)
    )
    if wanted_pools != found_pools:
        yield f"tables of the layers {found_pools}, not {wanted_pools}"


def _is_compared(config: Config, component: str, name: str) -> bool:
    if (component, name) in _NOT_KEPT or name.startswith("moe_"):
        return False
    if component == "memory" and not config.memory.enabled:
        return False
    if name == "rope_scaling_factor":
        return config.model.use_rope_scaling
    if name == "ffn_hidden_size":
        # Where every layer has a memory in the MLP's place, nothing has this width.
        return bool(mlp_layers(config))
    return decides_model(component, name) or (component, name) in _ALSO
