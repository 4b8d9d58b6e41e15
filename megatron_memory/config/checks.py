"""Checks over the whole configuration, once, before any process group or model exists.

Every check yields complete messages: the flags, their values, the constraint, and what to do.
"""

import math
import os
from collections.abc import Iterator, Mapping

from megatron_memory.config.checks_memory import memory_problems
from megatron_memory.config.checks_parallel import parallel_problems
from megatron_memory.config.checks_positions import position_problems
from megatron_memory.config.convert import problem_with
from megatron_memory.config.flags import all_flags
from megatron_memory.config.problems import raise_problems
from megatron_memory.config.schema import Config
from megatron_memory.exceptions import ConfigurationError
from megatron_memory.optional import OPTIONAL_PACKAGES


def check_config(config: Config, world_size: int) -> None:
    """Raise one `ConfigurationError` with everything that cannot work in `config`.

    `world_size` is the number of ranks of the run. The outcome depends on the arguments alone, so
    that every rank reaches the same one and none is left waiting.
    """
    raise_problems(_field_problems(config))
    raise_problems(
        [
            *_model_problems(config),
            *position_problems(config),
            *_expert_problems(config),
            *memory_problems(config),
            *parallel_problems(config, world_size),
            *_recompute_problems(config),
            *_schedule_problems(config),
            *_optimizer_problems(config),
            *_checkpoint_problems(config),
            *_data_problems(config),
            *_folder_problems(config),
        ]
    )


def check_layers_available(config: Config, *, is_cuda: bool, has_transformer_engine: bool) -> None:
    """Raise a `ConfigurationError` where `config` asks for what this machine lacks.

    For after `select_backend`, which checks the device itself.
    """
    raise_problems(_layer_problems(config, is_cuda, has_transformer_engine))


def _field_problems(config: Config) -> Iterator[str]:
    """Bounds and choices of each field; parsed configurations have passed them already."""
    for flag in all_flags().values():
        value = getattr(getattr(config, flag.component), flag.field.name)
        problem = problem_with(flag.spelled, value, flag.value_type, flag.option)
        if problem is not None:
            yield problem


def _model_problems(config: Config) -> Iterator[str]:
    model = config.model
    heads, groups = model.num_attention_heads, model.num_query_groups
    if model.hidden_size % heads and model.kv_channels == model.hidden_size // heads:
        yield (
            f"--hidden-size {model.hidden_size} is not divisible by --num-attention-heads {heads}: "
            "change one of them, or give another head width by --kv-channels."
        )
    if heads % groups:
        yield (
            f"--num-attention-heads {heads} is not divisible by --num-query-groups {groups}: "
            "each group serves an equal number of heads. Choose a divisor of the heads."
        )
    if (
        model.position_embedding_type == "rope"
        and int(model.kv_channels * model.rotary_percent) % 2
    ):
        yield (
            f"--kv-channels {model.kv_channels} times --rotary-percent {model.rotary_percent} is "
            "odd: rotary embeddings turn pairs of channels. Make it even."
        )
    if model.seq_length > model.max_position_embeddings:
        yield (
            f"--seq-length {model.seq_length} exceeds --max-position-embeddings "
            f"{model.max_position_embeddings}: raise the latter to at least {model.seq_length}."
        )


def _expert_problems(config: Config) -> Iterator[str]:
    model, expert_ranks = config.model, config.parallel.expert_model_parallel_size
    if model.num_experts is None:
        if expert_ranks > 1:
            yield (
                f"--expert-model-parallel-size {expert_ranks} splits experts, and there are none: "
                "give --num-experts, or leave the flag away."
            )
        return
    if model.moe_router_topk > model.num_experts:
        yield (
            f"--moe-router-topk {model.moe_router_topk} exceeds --num-experts "
            f"{model.num_experts}: a token can visit each expert once. Lower it."
        )
    if model.num_experts % expert_ranks:
        yield (
            f"--num-experts {model.num_experts} is not divisible by --expert-model-parallel-size "
            f"{expert_ranks}: each rank holds an equal number. Choose a divisor of the experts."
        )
    if config.parallel.tensor_model_parallel_size > 1 and not config.parallel.sequence_parallel:
        yield (
            f"--num-experts {model.num_experts} with --tensor-model-parallel-size "
            f"{config.parallel.tensor_model_parallel_size} trains only with --sequence-parallel: "
            "add it."
        )


def _recompute_problems(config: Config) -> Iterator[str]:
    recompute, num_layers = config.recompute, config.model.num_layers
    granularity = recompute.recompute_granularity
    if granularity == "full":
        if recompute.recompute_method is None or recompute.recompute_num_layers is None:
            yield (
                "--recompute-granularity full needs --recompute-method and "
                "--recompute-num-layers: give for example --recompute-method uniform "
                "--recompute-num-layers 1."
            )
        elif recompute.recompute_num_layers > num_layers:
            yield (
                f"--recompute-num-layers {recompute.recompute_num_layers} exceeds --num-layers "
                f"{num_layers}: lower it."
            )
        elif recompute.recompute_method == "uniform":
            yield from _uneven_recompute_problems(config, recompute.recompute_num_layers)
    elif recompute.recompute_method is not None or recompute.recompute_num_layers is not None:
        yield (
            "--recompute-method and --recompute-num-layers belong to --recompute-granularity full, "
            f"but it is {granularity or 'not given'}: give it, or omit them."
        )
    modules = recompute.recompute_modules or ()
    if modules and granularity != "selective":
        yield (
            f"--recompute-modules {' '.join(modules)} belongs to --recompute-granularity "
            f"selective, but it is {granularity or 'not given'}: give it, or leave these away."
        )
    if "memory" in modules:
        yield from _memory_recompute_problems(config)
    for module in modules:
        if module.startswith("moe") and config.model.num_experts is None:
            yield f"--recompute-modules {module} needs --num-experts: leave {module} away."
    if "moe_act" in modules and not config.model.moe_grouped_gemm:
        yield "--recompute-modules moe_act needs --moe-grouped-gemm: add it, or use moe instead."


def _uneven_recompute_problems(config: Config, group: int) -> Iterator[str]:
    """megatron-core 0.16 looks for the layers that a stage's last group lacks."""
    try:
        stages = config.stages
    except ConfigurationError:  # checks_parallel says it
        return
    sizes = sorted({len(stage.layers) for stage in stages if len(stage.layers) % group})
    if sizes:
        where = "the model has" if len(stages) == 1 else "a pipeline stage has"
        yield (
            f"--recompute-method uniform --recompute-num-layers {group} makes groups of {group} "
            f"layers, and {where} {sizes[0]}: choose a divisor, 1 for the least memory."
        )


def _memory_recompute_problems(config: Config) -> Iterator[str]:
    memory = config.memory
    if not memory.enabled:
        yield "--recompute-modules memory needs --memory-layers: give them, or leave memory away."
        return
    kept = "its backward pass needs little but indices and weights, which are always kept"
    if memory.variant == "peer":
        yield (
            f"--recompute-modules memory saves nothing with --memory-variant peer: {kept}. "
            "Leave memory away."
        )
    elif memory.variant == "pkm" and memory.value_dim == config.model.hidden_size:
        yield (
            f"--recompute-modules memory saves nothing with --memory-variant pkm of "
            f"--memory-value-dim {memory.value_dim}, the hidden size: {kept}. Leave memory away."
        )
    elif memory.variant == "pkm" and memory.parallel_size > 1:
        yield (
            f"--recompute-modules memory saves nothing with --memory-variant pkm and "
            f"--memory-parallel-size {memory.parallel_size}: the sums received from the neighbours "
            "are kept. Leave memory away."
        )


def _schedule_problems(config: Config) -> Iterator[str]:
    schedule, memory = config.optimizer, config.memory
    if schedule.min_lr > schedule.lr:
        yield f"--min-lr {schedule.min_lr} exceeds --lr {schedule.lr}: lower it."
    if schedule.lr_warmup_fraction is not None and schedule.lr_warmup_iters:
        yield (
            f"--lr-warmup-fraction {schedule.lr_warmup_fraction} and --lr-warmup-iters "
            f"{schedule.lr_warmup_iters} both set the warm-up: give one of them."
        )
    elif schedule.warmup_iters >= schedule.lr_decay_iters:
        yield (
            f"--lr-warmup-iters {schedule.lr_warmup_iters} leaves nothing of --lr-decay-iters "
            f"{schedule.lr_decay_iters}: warm up for fewer iterations."
        )
    peaks = {"--lr": schedule.lr}
    if memory.enabled:
        peaks["--memory-value-lr"] = memory.value_lr
    for flag, peak in peaks.items():
        if schedule.lr_warmup_init > peak:
            yield f"--lr-warmup-init {schedule.lr_warmup_init} exceeds {flag} {peak}: lower it."
    yield from _wsd_problems(config)


def _wsd_problems(config: Config) -> Iterator[str]:
    schedule = config.optimizer
    final_iters = schedule.lr_wsd_decay_iters
    if schedule.lr_decay_style == "WSD" and final_iters is None:
        yield (
            "--lr-decay-style WSD needs --lr-wsd-decay-iters: give the iterations of the final "
            "decay."
        )
    elif final_iters is not None and schedule.lr_decay_style != "WSD":
        yield (
            f"--lr-wsd-decay-iters {final_iters} belongs to --lr-decay-style WSD, but it is "
            f"{schedule.lr_decay_style}: leave one of them away."
        )
    elif final_iters is not None:
        steady = schedule.lr_decay_iters - schedule.warmup_iters
        if final_iters > steady:
            yield (
                f"--lr-wsd-decay-iters {final_iters} exceeds the {steady:g} iterations between "
                f"warm-up and --lr-decay-iters {schedule.lr_decay_iters}: lower it."
            )


def _optimizer_problems(config: Config) -> Iterator[str]:
    optimizer, parallel = config.optimizer, config.parallel
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    if start > end:
        yield f"--start-weight-decay {start} exceeds --end-weight-decay {end}: lower it."
    if optimizer.weight_decay_incr_style == "constant" and start != end:
        yield (
            f"--start-weight-decay {start} and --end-weight-decay {end} differ, but "
            "--weight-decay-incr-style is constant: make it linear or cosine, or give only "
            "--weight-decay."
        )
    if optimizer.override_opt_param_scheduler and optimizer.use_checkpoint_opt_param_scheduler:
        yield (
            "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler contradict "
            "each other: give one of them."
        )
    if optimizer.optimizer == "sgd" and parallel.use_distributed_optimizer:
        yield (
            "--optimizer sgd does not work with --use-distributed-optimizer, which shards Adam's "
            "state: leave one of them away."
        )


def _checkpoint_problems(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    need_save = {
        "--save-interval": checkpoint.save_interval,
        "--keep-last": checkpoint.keep_last,
        "--async-save": checkpoint.async_save,
        "--no-save-optim": checkpoint.no_save_optim,
        "--no-save-rng": checkpoint.no_save_rng,
        "--on-bad-step rewind": config.training.on_bad_step == "rewind",
    }
    need_load = {
        "--finetune": checkpoint.finetune,
        "--exit-on-missing-checkpoint": checkpoint.exit_on_missing_checkpoint,
        "--no-load-optim": checkpoint.no_load_optim,
        "--no-load-rng": checkpoint.no_load_rng,
    }
    if checkpoint.save is None and not config.training.dry_run:
        yield from _without("--save", "the directory for checkpoints", need_save)
    if config.training.on_bad_step == "rewind" and checkpoint.no_save_optim:
        yield (
            "--on-bad-step rewind loads what was saved, and --no-save-optim leaves the optimizer's "
            "state out: give one of them."
        )
    if checkpoint.load is None:
        yield from _without("--load", "the directory of a checkpoint", need_load)


def _without(missing: str, meaning: str, flags: Mapping[str, object]) -> Iterator[str]:
    for flag, value in flags.items():
        if value:
            shown = flag if value is True else f"{flag} {value}"
            yield f"{shown} has no effect without {missing}: give {meaning}, or omit it."


def _data_problems(config: Config) -> Iterator[str]:
    data = config.data
    if data.tokenizer_type is None and data.vocab_size is None:
        yield (
            "--tokenizer-type is missing: give the tokenizer that the data was made with, for "
            "example --tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER."
        )
    single_splits = {
        "--train-data-path": data.train_data_path,
        "--valid-data-path": data.valid_data_path,
        "--test-data-path": data.test_data_path,
    }
    given = [f"{flag} {' '.join(paths)}" for flag, paths in single_splits.items() if paths]
    if data.data_path and given:
        yield (
            f"--data-path {' '.join(data.data_path)} is split by --split, so {given[0]} cannot be "
            "given too: choose one way."
        )
    if not data.data_path and given and not data.train_data_path:
        yield f"{given[0]} needs --train-data-path: give the data to train on."
    if data.split is not None and not data.data_path:
        yield (
            f"--split {data.split} divides --data-path, which is not given: give it, or leave "
            "--split away."
        )
    if not data.data_path and not given and not config.training.dry_run:
        yield (
            "--data-path is missing: give the prefix of a tokenised dataset, made by "
            "tools/preprocess_data.py."
        )
    yield from _split_problems(data.split)


def _split_problems(split: str | None) -> Iterator[str]:
    if split is None:
        return
    try:
        parts = [float(part) for part in split.replace("/", ",").split(",") if part.strip()]
    except ValueError:
        parts = []
    sound = all(math.isfinite(part) and part >= 0 for part in parts)
    if not 1 <= len(parts) <= 3 or not sound or not 0 < sum(parts) < math.inf:
        yield (
            f"--split {split!r:.80} is not up to three numbers for training, validation and test: "
            'write for example "969, 30, 1".'
        )


def _folder_problems(config: Config) -> Iterator[str]:
    folders = {
        "--save": config.checkpoint.save,
        "--load": config.checkpoint.load,
        "--tensorboard-dir": config.logging.tensorboard_dir,
        "--data-cache-path": config.data.data_cache_path,
    }
    for flag, path in folders.items():
        if path is not None and os.path.exists(path) and not os.path.isdir(path):
            yield f"{flag} {path} is a file: give a directory."


def _layer_problems(config: Config, is_cuda: bool, has_transformer_engine: bool) -> Iterator[str]:
    context = config.parallel.context_parallel_size
    needs = {
        "--transformer-impl transformer_engine": (
            config.model.transformer_impl == "transformer_engine" and context == 1,
            "use --transformer-impl local",
        ),
        "--moe-grouped-gemm": (config.model.moe_grouped_gemm, "omit it"),
        f"--context-parallel-size {context}": (
            context > 1,
            "use 1, with --sequence-parallel or --recompute-activations for long sequences",
        ),
    }
    for flag, (asked, alternative) in needs.items():
        if asked and not is_cuda:
            yield (
                f"{flag} works on GPUs only, and this run is on the CPU: {alternative} "
                "(or take a GPU)."
            )
        elif asked and not has_transformer_engine:
            yield (
                f"{flag} needs Transformer Engine, which is not installed: {alternative}, or run "
                f"{OPTIONAL_PACKAGES['te'].install}"
            )
    if context > 1 and is_cuda and has_transformer_engine and not config.precision.bf16:
        yield (
            f"--context-parallel-size {context} computes in fp32, for which Transformer Engine's "
            "attention over several ranks has no kernel: add --bf16, or use 1."
        )
    if not config.parallel.overlap_p2p_communication and not is_cuda:
        yield (
            "--no-overlap-p2p-communication works on GPUs only, and this run is on the CPU, where "
            "gloo would mix up the messages of interleaved stages: omit it."
        )
