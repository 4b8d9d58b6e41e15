"""The training loop."""

from dataclasses import dataclass
from typing import Literal

from megatron_memory.config.option import option


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batch sizes, length of the training, evaluation, and when to stop."""

    micro_batch_size: int = option(at_least=1)
    """Sequences that one data-parallel rank computes at a time."""
    global_batch_size: int = option(at_least=1)
    """Sequences of an optimizer step over all ranks; gradients accumulate over microbatches."""
    calculate_per_token_loss: bool = False
    """Weigh every token of the global batch alike, also where --eod-mask-loss or the data leave
    some microbatches fewer; without it, every microbatch."""
    train_iters: int = option(at_least=1)
    """Optimizer steps of the whole training, those before a restart included."""
    eval_interval: int = option(1000, at_least=1)
    """Iterations between two evaluations on the validation data."""
    eval_iters: int = option(100, at_least=0)
    """Batches of an evaluation; 0: never evaluate."""
    seed: int = option(1234, at_least=0, at_most=2**32 - 1)
    """Seed of initialisation, the order of the data, and dropout and random slots, which every step
    and data-parallel rank draws anew."""
    exit_interval: int | None = option(None, at_least=1)
    """Save and exit after an iteration divisible by this."""
    exit_duration_in_mins: int | None = option(None, at_least=1)
    """Save and exit after this many minutes."""
    on_bad_step: Literal["stop", "skip", "rewind"] = "stop"
    """What follows a step whose loss or gradient is NaN or infinite; no rank makes its update.
    stop: end the run without saving (exit code 2); skip: omit the step and go on; rewind: load the
    newest checkpoint of --save, and go on with the data after the bad step's."""
    max_bad_steps: int = option(10, at_least=1)
    """End the run when --on-bad-step skip omits more steps than this in a row, or rewind goes back
    to the same checkpoint more often."""
    loss_spike_factor: float | None = option(None, above=1)
    """Report and count each training loss above this many times the median of the last 100
    iterations (2, say). While a spike lasts, --keep-last deletes no checkpoint from before it.
    None: spikes are not looked for."""
    check_replicas_interval: int | None = option(
        1000, at_least=1, synonyms=("check_weight_hash_across_dp_replicas_interval",)
    )
    """Iterations between two comparisons, bit for bit, of the weights and optimizer states that
    several ranks have copies of. A difference ends the run and names rank and tensor. Every save
    compares them as well. None: only saves do."""
    dry_run: bool = False
    """Print parameters, placement, memory and FLOPs of this configuration, then exit."""
