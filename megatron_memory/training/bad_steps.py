"""What follows a step whose loss or gradient is not finite, and losses that jump.

megatron-core's rerun state machine is not used: it repeats a step to tell faulty hardware from a
faulty batch, needs the host for every microbatch and bucket, and ends the run on one rank. Here
all ranks agree before the update, by the all-reduce that asks for signals anyway.
"""

import collections
import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

from megatron_memory.config import TrainingConfig
from megatron_memory.exceptions import CheckpointError, TrainingError
from megatron_memory.training.step import StepResult

_WINDOW = 100
_FEWEST = 10
"""Losses before which nothing is called a spike."""

Rewind = Callable[[], int]
"""Loads the newest checkpoint, on all ranks, and returns its iteration."""


class BadSteps:
    """Goes on after a bad step, or ends the run. Every method is called on all ranks alike.

    Args:
        training: says how.
        rewind: None where there is nothing to go back to.
        say: receives a line.
    """

    def __init__(
        self,
        training: TrainingConfig,
        rewind: Rewind | None,
        say: Callable[[str], None],
    ):
        self._training, self._rewind, self._say = training, rewind, say
        self._in_a_row = 0
        self._rewound_to: int | None = None
        self._times_rewound = 0

    def look(self, iteration: int, result: StepResult) -> None:
        """After every step.

        Raises:
            TrainingError: on every rank: the step was bad, and the run does not go on.
        """
        if not result.skipped:
            self._in_a_row = 0
            return
        problem = _describe(iteration, result)
        self._in_a_row += 1
        if self._training.on_bad_step == "stop":
            raise TrainingError(f"{problem}. The training stops without saving. {_ADVICE}")
        if self._training.on_bad_step == "skip":
            self._skip(problem, is_lasting=result.is_lasting)
        else:
            self._go_back(problem)

    def look_at_damage(self, problem: TrainingError) -> None:
        """A weight or state is not finite, though losses are.

        Raises:
            TrainingError: on every rank, unless the run can go back to a checkpoint.
        """
        if self._training.on_bad_step != "rewind":
            raise problem
        self._go_back(str(problem))

    def _skip(self, problem: str, *, is_lasting: bool) -> None:
        limit = self._training.max_bad_steps
        if is_lasting:
            raise TrainingError(
                f"{problem}. Omitting steps does not help, because the weights or states stay so. "
                f"{_ADVICE}"
            )
        if self._in_a_row > limit:
            raise TrainingError(
                f"{problem}. It is number {self._in_a_row} in a row, and --max-bad-steps is "
                f"{limit}. {_ADVICE}"
            )
        self._say(f"{problem}. No rank updates: the step is omitted (--on-bad-step skip)")

    def _go_back(self, problem: str) -> None:
        if self._rewind is None:
            raise TrainingError(
                f"{problem}. There is nothing to go back to: --on-bad-step rewind needs --save. "
                f"{_ADVICE}"
            )
        self._say(f"{problem}. All ranks go back to the newest checkpoint (--on-bad-step rewind)")
        try:
            iteration = self._rewind()
        except CheckpointError as error:
            raise TrainingError(f"{problem}. {error}. {_ADVICE}") from error
        if iteration != self._rewound_to:
            self._rewound_to, self._times_rewound = iteration, 0
        self._times_rewound += 1
        limit = self._training.max_bad_steps
        if self._times_rewound > limit:
            raise TrainingError(
                f"{problem}. The run has gone back to the checkpoint of iteration {iteration} "
                f"{limit} times already, which is --max-bad-steps. {_ADVICE}"
            )
        self._say(
            f"the weights are those of iteration {iteration}; the training goes on with the data "
            "after the bad step's"
        )


_ADVICE = (
    "Go back to a checkpoint with --load, and lower --lr or --memory-value-lr, lengthen "
    "--lr-warmup-iters, or try --memory-qk-norm or --clip-grad 1.0"
)


def _describe(iteration: int, result: StepResult) -> str:
    values = ""
    if result.value_learning_rate is not None:
        values = (
            f" (values: gradient norm {result.value_grad_norm}, "
            f"learning rate {result.value_learning_rate:.3g})"
        )
    return (
        f"iteration {iteration}: the loss is {result.loss}, the gradient norm {result.grad_norm}, "
        f"at learning rate {result.learning_rate:.3g}{values}; {result.cause}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spike:
    """A loss far above those before."""

    first_iteration: int
    """At which it began."""
    median: float
    """Of the losses before it."""


SpikeState = dict[str, Any]
"""Plain values: `losses`, those of the window, and `spike`, the fields of the one that lasts."""


def is_spike_state(value: Any) -> bool:
    """Whether a checkpoint's value can be one."""
    if value is None:
        return True
    if type(value) is not dict or value.keys() != {"losses", "spike"}:
        return False
    losses, spike = value["losses"], value["spike"]
    return (
        type(losses) is list
        and len(losses) <= _WINDOW
        and all(type(loss) is float and math.isfinite(loss) for loss in losses)
        and (spike is None or _is_spike(spike))
    )


def _is_spike(fields: Any) -> bool:
    return (
        type(fields) is dict
        and fields.keys() == {"first_iteration", "median"}
        and type(fields["first_iteration"]) is int
        and type(fields["median"]) is float
    )


class LossSpikes:
    """Tells losses above a multiple of the median of the last ones.

    The losses of a spike are not among those: it lasts until one is low again.

    Args:
        factor: the multiple; None looks for none.
        say: receives a line when a spike begins and when it ends.
        before: what `state` gave in the run that this one goes on with; None: nothing is known.
    """

    def __init__(
        self, factor: float | None, say: Callable[[str], None], before: SpikeState | None = None
    ):
        self._factor, self._say = factor, say
        self._losses: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self.spike: Spike | None = None
        """The one that lasts."""
        if before is not None and factor is not None:
            self._losses.extend(before["losses"])
            if before["spike"] is not None:
                self.spike = Spike(**before["spike"])

    def state(self) -> SpikeState | None:
        """For a checkpoint, so that a run that starts again during a spike knows of it."""
        if self._factor is None:
            return None
        spike = None if self.spike is None else dataclasses.asdict(self.spike)
        return {"losses": list(self._losses), "spike": spike}

    def look(self, iteration: int, result: StepResult) -> bool:
        """Whether a step's loss is part of a spike; a bad step's counts for nothing."""
        if self._factor is None or result.skipped:
            return False
        if len(self._losses) >= _FEWEST:
            median = statistics.median(self._losses)
            if result.loss > self._factor * median:
                self._begin(iteration, result.loss, median)
                return True
        self._end(iteration, result.loss)
        self._losses.append(result.loss)
        return False

    def _begin(self, iteration: int, loss: float, median: float) -> None:
        if self.spike is None:
            self.spike = Spike(first_iteration=iteration, median=median)
            self._say(
                f"iteration {iteration}: a loss spike: {loss:.6f} is more than {self._factor} "
                f"times {median:.6f}, the median of the last {len(self._losses)} losses; "
                "checkpoints from before it are kept while it lasts"
            )

    def _end(self, iteration: int, loss: float) -> None:
        if self.spike is not None:
            lasted = iteration - self.spike.first_iteration
            self._say(
                f"iteration {iteration}: loss {loss:.6f}, the spike of {lasted} steps is over"
            )
            self.spike = None
