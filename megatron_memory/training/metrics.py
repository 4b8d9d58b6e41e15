"""What a training reports: sums over a log interval, and the figures made of them."""

import dataclasses

from megatron_memory.memory.usage import UsageFigures
from megatron_memory.training.step import StepResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The figures of one log interval."""

    iteration: int
    """The interval's last."""
    loss: float
    """Mean over the interval's tokens that are not masked, in nats; NaN where all are."""
    last: StepResult
    """The interval's last step: gradient norms and learning rates."""
    num_skipped: int
    """Steps whose loss or gradients were not finite: no rank updated its weights."""
    num_spikes: int
    """Steps whose loss was that of a spike."""
    seconds_per_iteration: float
    """Mean time of a step, reading its data included; evaluation and checkpoints apart."""
    tokens_per_second: float
    """Of all ranks together."""
    tflops_per_device: float
    """The model's own FLOPs; what recompute repeats is not counted."""
    mfu: float | None
    """Part of the GPU's peak; None where that is not known."""
    memory_gib: float
    """Peak of the fullest rank."""
    seconds_left: float
    """Until the last iteration, at the pace so far, evaluation and checkpoints included."""
    usage: dict[str, UsageFigures]
    """Of the slots, by layer; empty without memory."""

    def curves(self) -> dict[str, float]:
        """Every figure by its name in TensorBoard."""
        curves = {
            "loss/train": self.loss,
            "learning_rate/model": self.last.learning_rate,
            "speed/tokens_per_second": self.tokens_per_second,
            "speed/ms_per_iteration": self.seconds_per_iteration * 1e3,
            "speed/tflops_per_device": self.tflops_per_device,
            "memory/peak_gib": self.memory_gib,
            "steps/skipped": self.num_skipped,
            "steps/loss_spikes": self.num_spikes,
        }
        optional = {
            "gradient_norm/model": self.last.grad_norm,
            "gradient_norm/values": self.last.value_grad_norm,
            "learning_rate/values": self.last.value_learning_rate,
            "speed/mfu": self.mfu,
        }
        curves |= {name: value for name, value in optional.items() if value is not None}
        for layer, figures in self.usage.items():
            curves[f"slots_read/{layer}"] = figures.share_of_slots_read
            curves[f"slots_kl_to_uniform/{layer}"] = figures.kl_to_uniform
        return curves


class Interval:
    """Sums the steps since the last report."""

    def __init__(self) -> None:
        self.results: list[StepResult] = []
        self.seconds = 0.0
        self.num_spikes = 0

    def add(self, result: StepResult, seconds: float, *, is_spike: bool = False) -> None:
        """Count a step, the time it took, and whether its loss was that of a spike."""
        self.num_spikes += is_spike
        self.results.append(result)
        self.seconds += seconds

    @property
    def num_steps(self) -> int:
        """Steps since the last report."""
        return len(self.results)

    @property
    def loss(self) -> float:
        """Mean over the tokens of all steps that were taken; NaN where there are none."""
        taken = [result for result in self.results if not result.skipped]
        num_tokens = sum(result.num_tokens for result in taken)
        total = sum(result.loss * result.num_tokens for result in taken)
        return total / num_tokens if num_tokens else float("nan")

    @property
    def num_skipped(self) -> int:
        """Steps without an update."""
        return sum(result.skipped for result in self.results)
