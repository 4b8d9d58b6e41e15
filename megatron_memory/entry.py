"""What the programs that torchrun starts share: how an error that the user can fix ends them."""

import os
import signal
import sys
import time
from collections.abc import Callable

from megatron_memory.exceptions import USER_ERRORS, SaveError
from megatron_memory.output import accept_any_text, let_go_of_output, try_print

EXIT_ERROR = 2
EXIT_NOT_SAVED = 3
_SECONDS_FOR_FIRST_RANK = 3
_FROM_USERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)


def run_entry(run: Callable[[], int]) -> int:
    """The exit code of `run`; EXIT_NOT_SAVED or EXIT_ERROR with an error's message, no traceback.

    The ranks meet the same error, and torchrun ends all after the first: the message of a node's
    first rank comes first there, and is usually the only one.
    """
    accept_any_text()
    try:
        return _run_entry(run)
    finally:
        let_go_of_output()


def _run_entry(run: Callable[[], int]) -> int:
    try:
        return run()
    except KeyboardInterrupt:
        # Of a training: before it has begun to catch signals.
        try_print("interrupted", sys.stderr)
        return 128 + signal.SIGINT
    except USER_ERRORS as error:
        rank = int(os.environ.get("RANK", "0"))
        # Nodes have logs of their own, and torchrun of one node ends soon after another's.
        if int(os.environ.get("LOCAL_RANK", rank)) > 0:
            time.sleep(_SECONDS_FOR_FIRST_RANK)
        prefix = "" if rank == 0 else f"rank {rank}: "
        try_print(f"{prefix}{type(error).__name__}: {error}", sys.stderr)
        return EXIT_NOT_SAVED if isinstance(error, SaveError) else EXIT_ERROR
    except OSError as error:
        # What is read is looked for before it is opened, and asking may fail as well.
        if error.filename is None:
            raise
        reason = f"{os.fspath(error.filename)!s:.200}: {error.strerror}"
        try_print(f"{reason}. Check the path, its owner and its permissions", sys.stderr)
        return EXIT_ERROR


def exit_code_for_torchrun(exit_code: int) -> int:
    """The code to exit with, so that torchrun does not start again what shall stop.

    With --max-restarts torchrun restarts after every other code than 0. SIGUSR1, SIGUSR2, SIGINT
    and SIGHUP come from a user or a scheduler who wants the run to end; SIGTERM may be torchrun's
    own, before it restarts.
    """
    asked_to_stop = exit_code - 128 in _FROM_USERS
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    return 0 if asked_to_stop and restarts else exit_code
