"""Train a language model with memory layers.

    torchrun --nproc-per-node N -m megatron_memory.train --config FILE.yaml [--flags]

One process needs no torchrun: `python -m megatron_memory.train`. All flags: `--help`.

Signals: SIGTERM, SIGINT, SIGHUP, SIGUSR1 and SIGUSR2 to any rank end the training after the step at
hand, or in the middle of an evaluation, with a checkpoint; a second SIGINT ends it at once. SIGINT
and SIGHUP stay ignored where they were at the start (nohup, shells in the background). torchrun
passes SIGTERM, SIGINT and SIGHUP on to its processes, and kills them 30 seconds later; for the
others start it with `--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGUSR1,SIGUSR2`.

Exit codes:
    0        the training is complete, or --exit-interval or --exit-duration-in-mins is reached
    2        an error in flags, data or checkpoint, or a loss that is not a number: the message says
    3        checkpoints could not be written: the last one, or more in a row than --save-retries
    4        a rank has died or hangs (--rank-timeout): every other one names it
    128 + n  stopped and saved after signal n: 143 SIGTERM, 130 SIGINT, 129 SIGHUP, 138 SIGUSR1, 140
             SIGUSR2; but 0 for all but the first under torchrun --max-restarts, which would start
             the training again
    1        anything else; and torchrun's own where its processes exit with another code than 0

Keep this module light: the processes that write checkpoints import it, too.
"""

import os
import sys
from collections.abc import Sequence

from megatron_memory.entry import exit_code_for_torchrun, run_entry


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on this rank; returns its exit code."""
    return run_entry(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    from megatron_memory.config import check_config, check_layers_available, parse_arguments
    from megatron_memory.start import settings_of, start_alike

    config = start_alike(lambda: parse_arguments(argv), settings_of)
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
    return exit_code_for_torchrun(exit_code)


if __name__ == "__main__":
    sys.exit(main())
