"""How a model is to generate: stop tokens, begin, padding, sampling.

They come with a model that a conversion read, and are no settings of a training: a run keeps them
as they are, so that a later export has them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_memory.exceptions import CheckpointError

GENERATION = "generation"
"""Where a checkpoint's plain values have them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What a folder says of generation, as plain JSON values."""

    in_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of config.json."""
    in_file: Mapping[str, Any] | None = None
    """Of generation_config.json; None: there is no such file."""

    @classmethod
    def of_tokens(cls, tokens: Mapping[str, Any]) -> "GenerationSettings":
        """Of a model that was trained here: its tokenizer's special tokens."""
        return cls(in_config=dict(tokens), in_file=dict(tokens))

    @classmethod
    def of_common(cls, common: Mapping[str, Any], where: object) -> "GenerationSettings | None":
        """As a checkpoint of ours keeps them; None where it has none.

        Raises:
            CheckpointError: they are damaged.
        """
        stored = common.get(GENERATION)
        if stored is None:
            return None
        try:
            return cls(in_config=dict(stored["in_config"]), in_file=stored["in_file"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: its generation settings are damaged") from error

    def as_common(self) -> dict[str, Any]:
        """The reverse of `of_common`."""
        return {"in_config": dict(self.in_config), "in_file": self.in_file}

    def stop_tokens(self) -> tuple[int, ...]:
        """Every id that ends a text."""
        found = (self.in_file or self.in_config).get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        return tuple(number for number in ids if type(number) is int and number >= 0)


def carried(common: Mapping[str, Any]) -> dict[str, Any]:
    """What of a loaded checkpoint's plain values goes into those that the run writes."""
    return {GENERATION: common[GENERATION]} if GENERATION in common else {}
