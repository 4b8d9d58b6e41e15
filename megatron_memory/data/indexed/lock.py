"""One writer for each output."""

import errno
import fcntl
import os
import sys
import time
from types import TracebackType

from megatron_memory.exceptions import DataError

_SECONDS_FOR_WORKERS = 10.0
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class OutputLock:
    """Holds `PREFIX.lock` while this process writes `PREFIX.bin` and `PREFIX.idx`.

    The kernel lets go of it when the process ends, however that happens, so that a lock file that a
    killed process left is in nobody's way.
    """

    def __init__(self, prefix: str) -> None:
        """
        Raises:
            DataError: another process has it.
        """
        self.path = prefix + ".lock"
        os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
        self._descriptor = -1
        self._deadline = time.monotonic() + _SECONDS_FOR_WORKERS
        while self._descriptor < 0 or not self._is_current():
            self.release(remove=False)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            self._acquire(prefix)
        os.truncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def _acquire(self, prefix: str) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._descriptor, 20, 0).decode(errors="replace").strip()
            self.release(remove=False)
            if time.monotonic() < self._deadline and _is_dead(owner):
                # Workers of a killed process have its lock until they notice, in a moment.
                time.sleep(0.1)
                return
            raise DataError(
                f"{prefix}: another process ({owner or 'unknown'}) is writing this output. Wait "
                "for it, end it, or give another --output-prefix"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            print(
                f"warning: {self.path}: this file system has no locks ({error.strerror}): make "
                "sure that no other process writes the same output",
                file=sys.stderr,
            )

    def _is_current(self) -> bool:
        """Whether the file that is locked still has the name, or its last owner removed it."""
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            return False
        return os.path.samestat(named, os.fstat(self._descriptor))

    def release(self, *, remove: bool = True) -> None:
        """Let others write. Doing it again changes nothing."""
        if self._descriptor < 0:
            return
        if remove and self._is_current():
            os.unlink(self.path)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _is_dead(owner: str) -> bool:
    """Whether a process, by its number as text, is known to have ended."""
    try:
        os.kill(int(owner), 0)
    except (ValueError, ProcessLookupError):
        return True
    except OSError:
        return False
    return False
