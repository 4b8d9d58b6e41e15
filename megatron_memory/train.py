"""Train a language model with memory layers.

    torchrun --nproc-per-node N -m megatron_memory.train --config FILE.yaml [--flags]

One process needs no torchrun: `python -m megatron_memory.train`. All flags: `--help`.

Signals: SIGTERM, SIGUSR1 and SIGUSR2 to any rank end the training after the step at hand, with a
checkpoint. torchrun passes SIGTERM on to its processes, and kills them 30 seconds later; for the
others start it with `--signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGUSR2`.

Exit codes:
    0        the training is complete, or --exit-interval or --exit-duration-in-mins is reached
    2        an error in flags, data or checkpoint, or a loss that is not a number: the message says
    128 + n  stopped and saved after signal n: 143 SIGTERM, 138 SIGUSR1, 140 SIGUSR2
    1        anything else; and torchrun's own where its processes exit with another code than 0

Keep this module light: the processes that write checkpoints import it, too.
"""

import os
import sys
import time
from collections.abc import Sequence

EXIT_ERROR = 2
_SECONDS_FOR_FIRST_RANK = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on this rank; returns its exit code."""
    from megatron_memory.exceptions import CheckpointError, ConfigurationError, DataError
    from megatron_memory.training.errors import TrainingError

    try:
        return _run(argv)
    except (ConfigurationError, DataError, CheckpointError, TrainingError) as error:
        return _fail(error)


def _run(argv: Sequence[str] | None) -> int:
    from megatron_memory.config import check_config, check_layers_available, parse_arguments

    config = parse_arguments(argv)
    if config.training.dry_run:
        from megatron_memory.training.dry_run import dry_run

        return dry_run(config)
    check_config(config, int(os.environ.get("WORLD_SIZE", "1")))
    from megatron_memory.optional import is_installed
    from megatron_memory.runtime import prepare_megatron, select_backend

    prepare_megatron(config.parallel.device)
    backend = select_backend(config.parallel.device, config.parallel.distributed_backend)
    check_layers_available(
        config, is_cuda=backend.is_cuda, has_transformer_engine=is_installed("te")
    )
    from megatron_memory.runtime.distributed import shutdown_distributed
    from megatron_memory.training.program import run_training

    exit_code = run_training(config, backend)
    shutdown_distributed()
    return exit_code


def _fail(error: Exception) -> int:
    """Say what is wrong, once: the ranks meet the same error, and the first one's end is theirs."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(_SECONDS_FOR_FIRST_RANK)
    prefix = "" if rank == 0 else f"rank {rank}: "
    print(f"{prefix}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
