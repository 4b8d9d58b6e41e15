"""What the programs that torchrun starts share: how an error that the user can mend ends them."""

import os
import sys
import time
from collections.abc import Callable

from megatron_memory.exceptions import MEND_BY_USER

EXIT_ERROR = 2
_SECONDS_FOR_FIRST_RANK = 3


def run_entry(run: Callable[[], int]) -> int:
    """The exit code of `run`, or EXIT_ERROR with the error's message and no traceback.

    The ranks meet the same error, and torchrun ends all after the first: the first rank's message
    comes first, and is usually the only one.
    """
    try:
        return run()
    except MEND_BY_USER as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank > 0:
            time.sleep(_SECONDS_FOR_FIRST_RANK)
        prefix = "" if rank == 0 else f"rank {rank}: "
        print(f"{prefix}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return EXIT_ERROR
