"""Saving and loading."""

from dataclasses import dataclass
from typing import Literal

from megatron_memory.config.option import option

_CONVERT = (
    "checkpoints are read and written as torch_dist only; convert it with Megatron-LM's tools"
)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where checkpoints are, how often they are written, and what they hold."""

    save: str | None = None
    """Directory to write checkpoints to. None: nothing is saved."""
    load: str | None = None
    """Directory to take the newest checkpoint from."""
    start_anew: bool = False
    """Begin at iteration 0 in a --save that has checkpoints; these are moved to a folder earlier-N
    in it. Without this flag and without --load such a --save is refused."""
    allow_changed_data_order: bool = False
    """Go on from a checkpoint although the training data, or the order in which its samples come,
    is another one: some samples are repeated and others left out."""
    save_interval: int | None = option(None, at_least=1, synonyms=("persistent_save_interval",))
    """Iterations between two checkpoints. Without it: only when the training ends or is stopped."""
    keep_last: int | None = option(None, at_least=1)
    """Delete all but this many newest checkpoints. None: keep all."""
    save_retries: int = option(3, at_least=0)
    """Saves in a row that may fail, for lack of space or permission, before the training ends. Each
    is tried again after another --save-interval."""
    async_save: bool = False
    """Write checkpoints in the background while the training goes on."""
    checksums: Literal["xxh3_128", "sha256", "none"] = "xxh3_128"
    """Sums of a checkpoint's files, written with it; whichever it has are compared at load. sha256
    is slow, and what megatron-core 0.19 compares as well. none: neither written nor compared."""
    no_save_optim: bool = False
    """Leave the optimizer's state out of checkpoints."""
    no_save_rng: bool = False
    """Leave the random-number generators' state out of checkpoints."""
    no_load_optim: bool = False
    """Do not load the optimizer's state."""
    no_load_rng: bool = False
    """Do not load the random-number generators' state."""
    finetune: bool = False
    """Load the weights only, and start at iteration 0 with a new optimizer and new data."""
    exit_on_missing_checkpoint: bool = False
    """Fail where --load holds no checkpoint, instead of starting from random weights."""
    ckpt_format: Literal["torch_dist"] = option(
        "torch_dist",
        not_here={"torch": _CONVERT, "torch_dcp": _CONVERT, "fsdp_dtensor": _CONVERT},
    )
    """Format of checkpoints: megatron-core's distributed one, which any layout can load."""
