"""How many parameters a model has of which kind."""

from collections.abc import Iterable

from megatron_memory.inspection.contents import STATE, Contents
from megatron_memory.memory.usage import USAGE_PREFIX

_MEMORY = "memory "
_KEYS = ".router.keys"


def parameters_by_part(contents: Contents) -> dict[str, int]:
    """Numbers of the weights' elements by part, in the model's order; padding is not counted.

    By the files' names of other formats all is one part.
    """
    weights = {
        name: tensor
        for name, tensor in contents.tensors.items()
        if not name.startswith((STATE, "optim.", USAGE_PREFIX)) and name not in contents.copies
    }
    memories = [name.removesuffix("router.keys") for name in weights if name.endswith(_KEYS)]
    totals: dict[str, int] = {}
    for name, tensor in weights.items():
        count = 1
        for size in tensor.shape:
            count *= size
        part = part_of(name, memories)
        totals[part] = totals.get(part, 0) + count
    return {part: totals[part] for part in _PARTS if part in totals}


def memory_share(parts: dict[str, int]) -> float:
    """Part of the parameters that memory layers have, tables included."""
    total = sum(parts.values())
    memory = sum(count for part, count in parts.items() if part.startswith(_MEMORY))
    return memory / total if total else 0.0


_PARTS = (
    "embedding",
    "attention",
    "MLP",
    "experts",
    "norms",
    "output layer",
    "memory keys",
    "memory queries",
    "memory projections",
    "memory values",
    "other",
)


def part_of(name: str, memories: Iterable[str]) -> str:
    """One of the parts.

    Args:
        name: of a weight, ours.
        memories: what the names in memory layers begin with.
    """
    if name.startswith("memory."):
        return "memory values"
    for prefix in memories:
        if name.startswith(prefix):
            return _part_of_memory(name.removeprefix(prefix))
    for part, words in (
        ("norms", ("layernorm.", "layer_norm_")),
        ("embedding", ("embedding.",)),
        ("output layer", ("output_layer.",)),
        ("attention", (".self_attention.",)),
        ("experts", (".mlp.experts.", ".mlp.router.")),
        ("MLP", (".mlp.",)),
    ):
        if any(word in name for word in words):
            return part
    return "other"


def _part_of_memory(name: str) -> str:
    if name == "router.keys":
        return "memory keys"
    return "memory queries" if name.startswith("router.") else "memory projections"
