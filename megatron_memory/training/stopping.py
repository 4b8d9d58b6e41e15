"""Why a training stops before its last iteration, agreed on by all ranks after each step."""

import dataclasses
import signal
import time
from types import FrameType

import torch

from megatron_memory.config import TrainingConfig

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_IGNORED_BY_STARTER = (signal.SIGINT, signal.SIGHUP)
"""`nohup` and shells in the background start programs so that they are to ignore these."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop:
    """A reason to save and exit."""

    reason: str
    """For the user."""
    exit_code: int = 0
    """Of the program: 0 where the flags asked for the stop, 128 + n after signal n."""


class SignalCatcher:
    """Remembers the signals that stop a training, so that the step at hand can end in peace.

    A second SIGINT ends the process at once: nobody who presses Ctrl-C twice wants to wait.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal received last; 0: none."""

    def install(self) -> None:
        """Catch the signals from now on; from the main thread only."""
        for signum in STOP_SIGNALS:
            ignored = signal.getsignal(signum) == signal.SIG_IGN
            if not (ignored and signum in _IGNORED_BY_STARTER):
                signal.signal(signum, self._remember)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)


class StopChecker:
    """Asks in each step whether to go on.

    Args:
        training: says after how many iterations or minutes to exit.
        signals: of this rank; another rank's count as well.
        device: where the ranks' answers are added up.
    """

    def __init__(self, training: TrainingConfig, signals: SignalCatcher, device: torch.device):
        self._training = training
        self._signals = signals
        self._device = device
        self._started = time.monotonic()
        self._agreed = (0, False)

    def may_update(self, is_finite: bool) -> bool:
        """Whether every rank's loss and gradients are finite; a collective call of one small
        all-reduce, between the gradients and the update. What `check` is going to say is agreed on
        with it, so that a step has one agreement and not two."""
        minutes = (time.monotonic() - self._started) / 60
        limit = self._training.exit_duration_in_mins
        answers = [
            self._signals.received,
            int(limit is not None and minutes >= limit),
            int(not is_finite),
        ]
        agreed = torch.tensor(answers, dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
        signum, out_of_time, not_finite = agreed.tolist()
        self._agreed = (signum, bool(out_of_time))
        return not not_finite

    def check(self, iteration: int) -> Stop | None:
        """A reason to stop after `iteration`, whose step asked `may_update`; or None."""
        signum, out_of_time = self._agreed
        if signum:
            return _stop_after(signum)
        if out_of_time:
            minutes = self._training.exit_duration_in_mins
            return Stop(reason=f"--exit-duration-in-mins {minutes} have passed")
        interval = self._training.exit_interval
        if interval is not None and iteration % interval == 0:
            return Stop(reason=f"--exit-interval {interval} is reached")
        return None

    def check_signals(self) -> Stop | None:
        """A signal as a reason to stop, or None; a collective call of one small all-reduce."""
        agreed = torch.tensor([self._signals.received], dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
        signum = int(agreed.item())
        return _stop_after(signum) if signum else None


def _stop_after(signum: int) -> Stop:
    name = signal.Signals(signum).name
    return Stop(reason=f"{name} was received", exit_code=128 + signum)
