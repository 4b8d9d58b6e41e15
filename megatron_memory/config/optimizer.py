"""The optimizer and the schedule of its learning rate and weight decay."""

from dataclasses import dataclass
from typing import Literal

from megatron_memory.config.option import derived, fill_derived, option

_UNKNOWN_OPTIMIZERS = ("muon", "dist_muon", "adaptive_muon", "lion", "soap")
_NO_SUCH_OPTIMIZER = "only adam and sgd are built; use adam"


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """Optimizer of all parameters but the values', whose own settings begin with `--memory-value-`.

    (megatron-core's class of the same purpose is called OptimizerConfig.)
    """

    optimizer: Literal["adam", "sgd"] = option(
        "adam",
        not_here=dict.fromkeys(_UNKNOWN_OPTIMIZERS, _NO_SUCH_OPTIMIZER),
    )
    """Update rule; adam decouples the weight decay (AdamW)."""
    lr: float = option(at_least=0)
    """Peak learning rate."""
    min_lr: float = option(0.0, at_least=0)
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "linear"
    """Shape of the decay."""
    lr_decay_iters: int = derived("--train-iters", at_least=1)
    """Iterations until the learning rate has reached --min-lr, warm-up included."""
    lr_warmup_iters: int = option(0, at_least=0)
    """Iterations of linear warm-up."""
    lr_warmup_fraction: float | None = option(None, at_least=0, below=1)
    """Part of --lr-decay-iters to warm up over, instead of --lr-warmup-iters."""
    lr_warmup_init: float = option(0.0, at_least=0)
    """Learning rate at which the warm-up starts."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the final decay of --lr-decay-style WSD."""
    lr_wsd_decay_iters: int | None = option(None, at_least=1)
    """Iterations of the final decay of --lr-decay-style WSD."""
    weight_decay: float = option(0.01, at_least=0)
    """Weight decay."""
    start_weight_decay: float = derived("--weight-decay", at_least=0)
    """Weight decay at the start, where --weight-decay-incr-style is not constant."""
    end_weight_decay: float = derived("--weight-decay", at_least=0)
    """Weight decay at the end, where --weight-decay-incr-style is not constant."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the weight decay grows over the training."""
    apply_weight_decay_to_all: bool = False
    """Decay norms and biases too, as the memory paper's reference does. Without it, only
    matrices decay, as in Megatron-LM."""
    adam_beta1: float = option(0.9, at_least=0, below=1)
    """Adam's decay rate of the first moment."""
    adam_beta2: float = option(0.999, at_least=0, below=1)
    """Adam's decay rate of the second moment."""
    adam_eps: float = option(1e-8, above=0)
    """Adam's epsilon."""
    sgd_momentum: float = option(0.9, at_least=0, below=1)
    """Momentum of --optimizer sgd."""
    clip_grad: float = option(1.0, at_least=0)
    """Largest norm of the gradient of all parameters but the values. 0: no clipping."""
    override_opt_param_scheduler: bool = False
    """On loading, take the schedule from the flags and not from the checkpoint."""
    use_checkpoint_opt_param_scheduler: bool = False
    """On loading, take the schedule from the checkpoint and not from the flags."""

    def __post_init__(self) -> None:
        fill_derived(self, start_weight_decay=self.weight_decay, end_weight_decay=self.weight_decay)

    @property
    def warmup_iters(self) -> float:
        """Iterations of warm-up, from --lr-warmup-iters or --lr-warmup-fraction."""
        if self.lr_warmup_fraction is None:
            return self.lr_warmup_iters
        return self.lr_warmup_fraction * self.lr_decay_iters
