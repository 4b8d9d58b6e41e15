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
    """Begin at iteration 0 in a --save that has checkpoints already: they are moved to its
    subfolder earlier-1 (or 2, 3 ...). Without this flag, such a --save needs --load."""
    allow_changed_data_order: bool = False
    """Go on from a checkpoint although the training data or the order of its samples has changed,
    so that some samples are repeated and others omitted. Without it that is refused."""
    save_interval: int | None = option(None, at_least=1, synonyms=("persistent_save_interval",))
    """Iterations between two checkpoints. Without it: only when the training ends or is stopped."""
    keep_last: int | None = option(None, at_least=1)
    """Delete all but this many newest checkpoints. None: keep all."""
    save_retries: int = option(3, at_least=0)
    """After a save that failed (no space, no permission) the training goes on and tries again at
    the next --save-interval, this many times in a row. One more failure ends the run with exit
    code 3."""
    async_save: bool = False
    """Write checkpoints in the background while the training goes on."""
    checksums: Literal["xxh3_128", "sha256", "none"] = "xxh3_128"
    """Hash of a checkpoint's files, written with it as integrity.json. Loading compares the files
    with it, whichever hash it has. sha256 is slower; megatron-core 0.19 can check it, too. none:
    nothing is written, and loading compares nothing."""
    no_save_optim: bool = False
    """Save checkpoints without the optimizer's state."""
    no_save_rng: bool = False
    """Save checkpoints without the states of random-number generators."""
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
