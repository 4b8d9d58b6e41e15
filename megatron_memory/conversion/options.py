"""What a conversion is told; the flags of tools/convert_checkpoint.py are made from it."""

import dataclasses
import re
from typing import Literal

from megatron_memory.config.option import option
from megatron_memory.exceptions import ConfigurationError

Format = Literal["megatron", "lingua", "hf"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)", re.IGNORECASE)
_SMALLEST_SHARD = 10_000
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What is read."""

    source_format: Format = option(synonyms=("from",))
    """What is read. megatron: a training's checkpoint of this program; lingua: of the memory
    paper's public reference, sharded or consolidated; hf: a Hugging Face folder."""
    load: str
    """Folder to read: of a run (its newest checkpoint), or of one checkpoint."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What is written."""

    target_format: Format = option(synonyms=("to",))
    """What is written: megatron, lingua or hf."""
    save: str
    """New folder to write; it appears when it is complete."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Type of the weights. Without it: as they are."""
    weights_only: bool = False
    """Write the weights without the optimizer's state."""
    target_tensor_parallel_size: int = option(1, at_least=1)
    """To megatron: --tensor-model-parallel-size of the run; it pads the vocabulary. Others can load
    the checkpoint as well."""
    target_pipeline_parallel_size: int = option(1, at_least=1)
    """To megatron: --pipeline-model-parallel-size of the run."""
    target_memory_parallel_size: int = option(1, at_least=1)
    """To megatron: --memory-parallel-size of the run."""
    tokenizer_model: str | None = None
    """To hf: the tokenizer's folder, where the checkpoint's own is not at its place any more."""
    hf_model_type: str | None = None
    """To hf: family of the model (llama, mistral, qwen2, qwen3), where several have the same."""
    max_shard_size: str = "5GB"
    """To hf: size of a weights file, as 5GB or 500MB."""

    def __post_init__(self) -> None:
        if not _SIZE.fullmatch(self.max_shard_size) or self.max_shard_bytes < _SMALLEST_SHARD:
            raise ConfigurationError(
                f"--max-shard-size {self.max_shard_size}: write a number and a unit, as 5GB; at "
                f"least {_SMALLEST_SHARD // 1000}KB"
            )

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` as a number."""
        match = _SIZE.fullmatch(self.max_shard_size)
        assert match is not None, "checked on construction"
        return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checking:
    """What is checked afterwards."""

    verify: bool | None = None
    """Read the result back and compare every bit, then run both models on fixed tokens and compare
    their logits in fp32. Without the flag: for models of up to 1,000,000,000 parameters; tokenizer
    and generation settings are compared for larger ones, too."""
    tolerance: float = option(1e-4, at_least=0)
    """Largest difference of logits allowed, as a part of the largest logit (at least 1)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """Convert a checkpoint from one format to another."""

    source: Source
    """From"""
    target: Target
    """To"""
    checking: Checking
    """Checks"""
