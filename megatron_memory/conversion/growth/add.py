"""A dense model becomes one with memory."""

import dataclasses
import re

from megatron_memory.config import Config, MemoryConfig
from megatron_memory.config.checks_memory import memory_problems
from megatron_memory.config.pools import memory_layers, with_share_groups
from megatron_memory.config.problems import raise_problems
from megatron_memory.conversion.growth.fresh import fresh_layers, fresh_table
from megatron_memory.conversion.growth.tensors import (
    added,
    constant,
    table_names,
    zero_moment,
)
from megatron_memory.conversion.saved_state import SavedState, Tensors
from megatron_memory.exceptions import ConfigurationError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(mlp\..*)")
_FUSED_NORM = "mlp.linear_fc1.layer_norm_"


def add_memory(state: SavedState, memory: MemoryConfig, seed: int) -> SavedState:
    """A dense model with memory layers; needs Megatron's groups of one process.

    **Beside the MLP** (`memory.beside_mlp`) the output is mlp(x) + memory(x), and memory(x) is
    exactly 0, because the last factor of a product is:

    | variant | zero | its gradient at step 0 |
    |---|---|---|
    | memory+, projected pkm | W2 and its bias, of W2 h | g h^T, h a sum of random rows |
    | pkm | the table, y = sum of w v | w g for each row v that is read |
    | peer | v, of sum of w gelu(u . x) v | w gelu(u . x) g, u random |

    None of these is 0. So that factor moves in the first step, and all others, whose gradients it
    multiplies, from the second on. The sigmoid gate of `--memory-gated` multiplies both by about a
    half.

    **In place of the MLP** everything begins as in a fresh training, and the MLPs' weights go.

    Moments of what stays are kept; those of new tensors are 0. Adam counts its steps for all
    tensors alike, so that after t steps it takes no account of their short history: see
    `largest_first_update`. The parameter groups are the coming training's own.

    Args:
        state: of a model without memory.
        memory: what to add, with `layers`.
        seed: of the initial values.

    Raises:
        ConfigurationError: the model has a memory, or the new one does not fit it.
    """
    if state.config.memory.enabled:
        raise ConfigurationError(
            f"the model has memory layers already ({state.config.memory.layers}): make their "
            "memory larger with `grow`, or start from a dense checkpoint."
        )
    config = dataclasses.replace(state.config, memory=memory)
    raise_problems(memory_problems(config))
    config = with_share_groups(config)
    common = {k: v for k, v in state.common.items() if k != "optimizer"}
    kept = dataclasses.replace(_with_norms_apart(state, config), config=config, common=common)
    return added(kept, _new_weights(config, seed), zero_moment)


def largest_first_update(beta1: float, beta2: float) -> float:
    """How many learning rates Adam moves a tensor at most while its moments, 0 at a late step, fill
    up with equal gradients: the maximum over k of (1 - beta1^k) / sqrt(1 - beta2^k); settled, 1."""
    updates = ((1 - beta1**k) / (1 - beta2**k) ** 0.5 for k in range(1, 1001))
    return max(updates) if beta2 else 1.0


def _with_norms_apart(state: SavedState, config: Config) -> SavedState:
    """The norms before the chosen layers' MLPs by the names that they have on their own, and
    without the MLPs that are replaced."""
    chosen = memory_layers(config)

    def apply(tensors: Tensors) -> Tensors:
        found: Tensors = {}
        for name, tensor in tensors.items():
            match = _LAYER.fullmatch(name)
            if match is None or int(match[1]) not in chosen:
                found[name] = tensor
            elif match[2].startswith(_FUSED_NORM):
                kind = match[2].removeprefix(_FUSED_NORM)
                found[f"decoder.layers.{match[1]}.pre_mlp_layernorm.{kind}"] = tensor
            elif config.memory.beside_mlp:
                found[name] = tensor
        return found

    return dataclasses.replace(
        state,
        weights=apply(state.weights),
        main_weights=apply(state.main_weights),
        moments={kind: apply(tensors) for kind, tensors in state.moments.items()},
    )


def _new_weights(config: Config, seed: int) -> Tensors:
    memory = config.memory
    weights = fresh_layers(config, seed)
    for name, pool, number in table_names(config):
        weights[name] = fresh_table(config, pool, number, seed)
    if not memory.beside_mlp:
        return weights
    projects = any(name.endswith(".linear_fc2.weight") for name in weights)
    zero = (".linear_fc2.weight", ".linear_fc2.bias") if projects else _ZERO_TABLES[memory.variant]
    return {
        name: constant(weight.shape) if name.endswith(zero) else weight
        for name, weight in weights.items()
    }


_ZERO_TABLES: dict[str, tuple[str, ...]] = {
    "pkm": (".values.weight",),
    "peer": (".values_v.weight",),
}
