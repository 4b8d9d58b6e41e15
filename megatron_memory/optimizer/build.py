"""The optimizer and its schedule for a configuration."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    ParamPredicate,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megatron_memory.config import Config, MemoryConfig
from megatron_memory.optimizer.guarded import GuardedOptimizer
from megatron_memory.optimizer.memory_optimizer import MemoryOptimizer


def build_optimizer(config: Config, model: list[DistributedDataParallel]) -> GuardedOptimizer:
    """Megatron's optimizer, guarded; for a model with memory, a `MemoryOptimizer`."""
    chain = get_megatron_optimizer(
        _optimizer_config(config), model, config_overrides=_overrides(config)
    )
    # Megatron gives parameters with `allreduce` False a chained optimizer of their own, the second.
    # Without one the values are frozen.
    if not config.memory.enabled or len(chain.chained_optimizers) == 1:
        return GuardedOptimizer(chain.chained_optimizers)
    dense, values = chain.chained_optimizers
    return MemoryOptimizer(dense, values, value_clip_grad=config.memory.value_clip_grad)


def build_scheduler(config: Config, optimizer: GuardedOptimizer) -> OptimizerParamScheduler:
    """Megatron's schedule of learning rate and weight decay, counted in samples."""
    settings, batch = config.optimizer, config.training.global_batch_size
    wsd_iters = settings.lr_wsd_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_iters * batch,
        lr_decay_steps=settings.lr_decay_iters * batch,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.start_weight_decay,
        end_wd=settings.end_weight_decay,
        wd_incr_steps=config.training.train_iters * batch,
        wd_incr_style=settings.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=settings.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=settings.override_opt_param_scheduler,
        wsd_decay_steps=None if wsd_iters is None else wsd_iters * batch,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )


def _optimizer_config(config: Config) -> OptimizerConfig:
    settings = config.optimizer
    return OptimizerConfig(
        optimizer=settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        sgd_momentum=settings.sgd_momentum,
        clip_grad=settings.clip_grad,
        bf16=config.precision.bf16,
        params_dtype=torch.bfloat16 if config.precision.bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )


def _overrides(config: Config) -> dict[ParamKey, ParamGroupOverride] | None:
    if not config.memory.enabled and not config.optimizer.apply_weight_decay_to_all:
        return None
    overrides: dict[ParamKey, ParamGroupOverride] = {}
    if not config.optimizer.apply_weight_decay_to_all:
        overrides[_norms_and_biases()] = ParamGroupOverride(wd_mult=0.0)
    if config.memory.enabled:
        overrides[ParamKey(attr="is_memory_value")] = _value_override(config.memory)
    return overrides


def _norms_and_biases() -> ParamKey:
    """Megatron's own rule for parameters that do not decay."""
    vectors = ParamPredicate(name="vectors", fn=lambda parameter: parameter.dim() == 1)
    return ParamKey(name="*.bias", predicate=vectors)


def _value_override(memory: MemoryConfig) -> ParamGroupOverride:
    return ParamGroupOverride(
        max_lr=memory.value_lr,
        min_lr=memory.value_min_lr,
        start_wd=memory.value_weight_decay,
        end_wd=memory.value_weight_decay,
    )
