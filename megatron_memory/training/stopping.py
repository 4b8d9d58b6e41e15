"""Why a training stops before its last iteration, agreed on by all ranks after each step."""

import dataclasses
import math
import signal
import time
from types import FrameType

import torch

from megatron_memory.config import TrainingConfig
from megatron_memory.exceptions import TrainingError
from megatron_memory.training.step import StepResult

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
    """Asks after each step whether to go on.

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

    def check(self, iteration: int, result: StepResult) -> Stop | None:
        """A reason to stop after `iteration`, or None; a collective call of one small all-reduce.

        Raises:
            TrainingError: on every rank, where the loss or a gradient norm is not finite.
        """
        minutes = (time.monotonic() - self._started) / 60
        limit = self._training.exit_duration_in_mins
        answers = [
            self._signals.received,
            int(limit is not None and minutes >= limit),
            int(not _is_finite(result)),
        ]
        agreed = torch.tensor(answers, dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
        signum, out_of_time, not_finite = agreed.tolist()
        if not_finite:
            raise _not_finite(iteration, result)
        if signum:
            return _stop_after(signum)
        if out_of_time:
            return Stop(reason=f"--exit-duration-in-mins {limit} have passed")
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


def _is_finite(result: StepResult) -> bool:
    numbers = (result.loss, result.grad_norm, result.value_grad_norm)
    return all(number is None or math.isfinite(number) for number in numbers)


def _not_finite(iteration: int, result: StepResult) -> TrainingError:
    values = ""
    if result.value_learning_rate is not None:
        values = (
            f" (values: gradient norm {result.value_grad_norm}, "
            f"learning rate {result.value_learning_rate:.3g})"
        )
    return TrainingError(
        f"iteration {iteration}: the loss is {result.loss}, the gradient norm {result.grad_norm}, "
        f"at learning rate {result.learning_rate:.3g}{values}. The training stops without saving. "
        "Go back to the newest checkpoint with --load, and lower --lr or --memory-value-lr, "
        "lengthen --lr-warmup-iters, or try --memory-qk-norm or --clip-grad 1.0"
    )
