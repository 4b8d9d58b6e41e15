"""What tools/grow.py is told; its flags are made from these, and the memory's own."""

import dataclasses
from typing import Literal

from megatron_memory.config import MemoryConfig
from megatron_memory.config.option import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What is read and written."""

    load: str
    """Folder to read: of a run (its newest checkpoint), or of one checkpoint."""
    save: str
    """New folder to write; it appears when it is complete and checked."""
    weights_only: bool = False
    """Write the weights without the optimizer's state."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initial:
    """Where new numbers come from."""

    seed: int | None = option(None, at_least=0)
    """Of the new tensors. Without it: the checkpoint's own --seed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checking:
    """How the change is measured."""

    verify: bool | None = None
    """Run the model before and after on the same tokens, in fp32. Without the flag: where the
    larger one has up to 1,000,000,000 parameters."""
    probe_data: str | None = None
    """Prefix of a .bin and .idx whose first tokens are run, to say the loss, too. Without it:
    random tokens."""
    probe_sequences: int = option(2, at_least=1, at_most=4096)
    """Sequences of tokens that are run."""
    probe_length: int = option(48, at_least=2)
    """Tokens of each, of --max-position-embeddings at most."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the memory goes, where not beside the MLPs."""

    replace: bool = False
    """The chosen layers' MLPs go, which changes the function; or --memory-beside-mlp: they stay,
    and it does not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddMemory:
    """Make a dense checkpoint one of a model with memory."""

    checkpoints: Checkpoints
    """Checkpoints"""
    place: Place
    """Place"""
    memory: MemoryConfig
    """Memory layers"""
    initial: Initial
    """Initial values"""
    checking: Checking
    """Check"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """What becomes larger, and how."""

    half_keys: int | None = option(None, at_least=2)
    """Half-keys that there shall be: the present number times 2, 4, 8 and so on. Rows are their
    square."""
    value_dim: int | None = option(None, at_least=1)
    """Columns that the table's rows shall have."""
    method: Literal["exact", "kept"] = "kept"
    """Of --half-keys. exact: the function stays, and each head reads 4 times as many rows for each
    doubling. kept: each reads as many as before, and new rows where their half-keys win."""
    key_noise: float = option(0.01, at_least=0)
    """Noise of the new half-keys, relative to their size: without it, copies that are read alike
    learn alike and stay equal. 0 for the function's sake alone."""
    new_key_scale: float = option(0.5, at_least=0, below=1)
    """With --method kept: length of the new half-keys, relative to the ones they copy (with
    --memory-qk-norm: cosine of the angle between them). Smaller: fewer new rows are read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grow:
    """Give a checkpoint's memory more rows, or wider ones."""

    checkpoints: Checkpoints
    """Checkpoints"""
    growth: Growth
    """Growth"""
    initial: Initial
    """Initial values"""
    checking: Checking
    """Check"""
