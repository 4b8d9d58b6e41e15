"""The reference's params.json, and our configuration."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_memory.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerSettings,
    TrainingConfig,
    check_values,
)
from megatron_memory.config.pools import memory_layers, memory_pools
from megatron_memory.conversion.decoder import check_size
from megatron_memory.conversion.saved_state import SavedState, Tensors
from megatron_memory.exceptions import CheckpointError, ConfigurationError

# Its defaults, which params.json need not repeat.
_OPTIM: dict[str, Any] = {
    "lr": 3e-4,
    "weight_decay": 0.1,
    "epsilon": 1e-8,
    "beta1": 0.9,
    "beta2": 0.95,
    "clip": 1.0,
    "scheduler": "cosine",
    "warmup": 2000,
    "lr_min_ratio": 0.1,
}
_MEMORY: dict[str, Any] = {
    "mem_n_keys": 1024,
    "mem_heads": 4,
    "mem_knn": 32,
    "mem_share_values": True,
    "mem_k_dim": 512,
    "mem_v_dim": -1,
    "swilu_projection": True,
    "value_fixed_lr": 1e-3,
    "mem_gated": False,
    "peer_variant": False,
}
_MODEL = {"norm_eps": 1e-5, "rope_theta": 1e4, "max_seqlen": 1024, "weight_tying": False}
# Of theirs, ours; wsd and inverse square root follow other formulas there.
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant"}
_BYTES = "ByteLevelTokenizer"
# All that is read of the model, and what says how it was made.
_KNOWN_OF_MODEL = {
    *_MODEL,
    "dim",
    "ffn_dim_multiplier",
    "head_dim",
    "init_base_std",
    "init_std_factor",
    "multiple_of",
    "n_heads",
    "n_kv_heads",
    "n_layers",
    "productkey_args",
    "seed",
    "sliding_window",
    "vocab_size",
}
NOT_KEPT = ("num_random_values", "query_dropout", "value_dropout")
"""Settings of a memory's training that the reference lacks."""
_KNOWN_OF_MEMORY = {*_MEMORY, "is_enabled", "layers"}


def config_of(params: dict[str, Any], weights: Tensors, path: Path) -> Config:
    """Our configuration of a run.

    Args:
        params: what params.json holds.
        weights: the model's tensors by the reference's names, which tell the MLP's width.
        path: of params.json, for messages.

    Raises:
        CheckpointError: a setting is missing, or has no equal here.
    """
    try:
        _check_known(params["model"])
        model = _MODEL | params["model"]
        config = Config(
            model=_model(model, weights),
            memory=_memory(_MEMORY | (model.get("productkey_args") or {}), params, model),
            optimizer=_optimizer(_OPTIM | params.get("optim", {}), path),
            training=_training(params),
            data=_data(params),
        )
        check_values(config)
        check_size(config, weights)
    except (ConfigurationError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: does not describe a model ({error!r})") from error
    return config


def _check_known(model: dict[str, Any]) -> None:
    """Refuse settings of another version of the reference, which may change the computation."""
    keys = model.get("productkey_args") or {}
    unknown = [name for name in model if name not in _KNOWN_OF_MODEL and model[name]]
    unknown += [
        f"productkey_args.{name}" for name in keys if name not in _KNOWN_OF_MEMORY and keys[name]
    ]
    if unknown:
        raise ConfigurationError(
            f"{', '.join(sorted(unknown))}: nothing is known of such settings here, and they may "
            "change what the model computes. If they do not, remove them"
        )


def _model(model: dict[str, Any], weights: Tensors) -> ModelConfig:
    if model.get("sliding_window"):
        raise ConfigurationError(
            f"sliding_window {model['sliding_window']}: attention over a window is not built here"
        )
    if int(model["rope_theta"]) != model["rope_theta"]:
        raise ConfigurationError(f"rope_theta {model['rope_theta']}: must be a whole number")
    widths = [t.num_rows for n, t in weights.items() if n.endswith("feed_forward.w1.weight")]
    heads = model["n_heads"]
    return ModelConfig(
        num_layers=model["n_layers"],
        hidden_size=model["dim"],
        # Every layer a memory layer: then no MLP tells its width.
        ffn_hidden_size=widths[0] if widths else None,  # type: ignore[arg-type]
        num_attention_heads=heads,
        num_query_groups=model.get("n_kv_heads") or heads,
        kv_channels=model.get("head_dim") or model["dim"] // heads,
        seq_length=model["max_seqlen"],
        position_embedding_type="rope",
        rotary_base=int(model["rope_theta"]),
        rotary_interleaved=True,
        normalization="RMSNorm",
        norm_epsilon=model["norm_eps"],
        swiglu=True,
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=not model["weight_tying"],
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )


def _memory(keys: dict[str, Any], params: dict[str, Any], model: dict[str, Any]) -> MemoryConfig:
    if not keys.get("is_enabled") or not keys.get("layers"):
        return MemoryConfig()
    optim = _OPTIM | params.get("optim", {})
    variant = "peer" if keys["peer_variant"] else "memory+" if keys["swilu_projection"] else "pkm"
    return MemoryConfig(
        layers=keys["layers"],
        variant=variant,  # type: ignore[arg-type]
        num_heads=keys["mem_heads"],
        top_k=keys["mem_knn"],
        num_half_keys=keys["mem_n_keys"],
        key_dim=keys["mem_k_dim"],
        value_dim=keys["mem_v_dim"] if keys["mem_v_dim"] > 0 else model["dim"],
        gated=keys["mem_gated"],
        share_scope="model" if keys["mem_share_values"] else "layer",
        value_lr=keys["value_fixed_lr"] or optim["lr"],
        value_weight_decay=optim["weight_decay"],
        value_clip_grad=optim["clip"],
    )


def _optimizer(optim: dict[str, Any], path: Path) -> OptimizerSettings:
    schedule = _SCHEDULES.get(optim["scheduler"])
    if schedule is None:
        raise ConfigurationError(
            f"optim.scheduler {optim['scheduler']}: follows another formula here. Write linear, "
            f"cosine or constant into {path.name}, and choose the schedule when you train"
        )
    return OptimizerSettings(
        lr=optim["lr"],
        min_lr=optim["lr"] * optim["lr_min_ratio"],
        lr_decay_style=schedule,  # type: ignore[arg-type]
        lr_warmup_iters=optim["warmup"],
        weight_decay=optim["weight_decay"],
        apply_weight_decay_to_all=True,
        adam_beta1=optim["beta1"],
        adam_beta2=optim["beta2"],
        adam_eps=optim["epsilon"],
        clip_grad=optim["clip"],
    )


def _training(params: dict[str, Any]) -> TrainingConfig:
    distributed, data = params.get("distributed", {}), params.get("data", {})
    micro_batch = data.get("batch_size", 1)
    copies = distributed.get("dp_shard", 1) * distributed.get("dp_replicate", 1)
    return TrainingConfig(
        micro_batch_size=micro_batch,
        global_batch_size=micro_batch * copies * params.get("grad_acc_steps", 1),
        train_iters=params.get("steps", 1000),
        seed=params.get("seed", 42),
    )


def _data(params: dict[str, Any]) -> DataConfig:
    tokenizer = params.get("data", {}).get("tokenizer") or {}
    return DataConfig(tokenizer_type=_BYTES if tokenizer.get("name") == "bytes" else None)


def params_of(config: Config, vocab_size: int) -> dict[str, Any]:
    """A params.json for our configuration: what the reference needs to build the model, and what
    is known of its training."""
    model, optim, training = config.model, config.optimizer, config.training
    return {
        "name": "megatron-memory",
        "steps": training.train_iters,
        "seed": training.seed,
        "optim": {
            "lr": optim.lr,
            "weight_decay": optim.weight_decay,
            "epsilon": optim.adam_eps,
            "beta1": optim.adam_beta1,
            "beta2": optim.adam_beta2,
            "clip": optim.clip_grad,
            "scheduler": optim.lr_decay_style,
            "warmup": int(optim.warmup_iters),
            "lr_min_ratio": optim.min_lr / optim.lr if optim.lr else 0.0,
        },
        "distributed": {
            "tp_size": 1,
            "memory_parallel_size": 1,
            "model_dtype": "bf16" if config.precision.bf16 else "fp32",
        },
        "model": {
            "dim": model.hidden_size,
            "n_layers": model.num_layers,
            "head_dim": _unless(model.kv_channels, model.hidden_size // model.num_attention_heads),
            "n_heads": model.num_attention_heads,
            "n_kv_heads": _unless(model.num_query_groups, model.num_attention_heads),
            **_ffn_of(model),
            "norm_eps": model.norm_epsilon,
            "rope_theta": float(model.rotary_base),
            "init_base_std": None,
            "init_std_factor": "disabled",
            "max_seqlen": model.max_position_embeddings,
            "productkey_args": _productkey_args(config),
            "seed": training.seed,
            "vocab_size": vocab_size,
            "weight_tying": not model.untie_embeddings_and_output_weights,
            "sliding_window": None,
        },
        "data": {
            "seq_len": model.seq_length,
            "batch_size": training.global_batch_size,
            "tokenizer": {
                "name": "bytes" if config.data.tokenizer_type == _BYTES else "sp",
                "path": config.data.tokenizer_model,
            },
        },
    }


def _unless(value: int, usual: int) -> int | None:
    return None if value == usual else value


def _ffn_of(model: ModelConfig) -> dict[str, Any]:
    """The reference computes an MLP's width: multiplier x 2/3 x 4 x dim, up to a multiple."""
    usual = int(2 * 4 * model.hidden_size / 3)
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if -(-usual // multiple) * multiple == model.ffn_hidden_size:
            return {"ffn_dim_multiplier": None, "multiple_of": multiple}
    # The middle of what rounds down to the width, so that no rounding error can miss it.
    multiplier = (model.ffn_hidden_size + 0.5) / usual
    assert int(multiplier * usual) == model.ffn_hidden_size, "no multiplier gives the MLP's width"
    return {"ffn_dim_multiplier": multiplier, "multiple_of": 1}


def _productkey_args(config: Config) -> dict[str, Any]:
    memory = config.memory
    return {
        "is_enabled": memory.enabled,
        "layers": ",".join(map(str, memory_layers(config))),
        "mem_n_keys": memory.num_half_keys,
        "mem_heads": memory.num_heads,
        "mem_knn": memory.top_k,
        "mem_share_values": memory.share_scope != "layer" and len(memory_pools(config)) == 1,
        "mem_k_dim": memory.key_dim,
        "mem_v_dim": -1 if memory.value_dim == config.model.hidden_size else memory.value_dim,
        "swilu_projection": memory.variant == "memory+",
        "value_fixed_lr": memory.value_lr,
        "mem_gated": memory.gated,
        "peer_variant": memory.variant == "peer",
    }


def not_in_lingua(state: SavedState) -> Iterator[str]:
    """What of a model, beside its computation, the reference's files cannot say; for the user."""
    memory = state.config.memory
    if state.tokenizer is not None:
        yield f"the tokenizer {state.tokenizer}"
    if state.generation is not None:
        yield "generation settings (stop tokens, sampling)"
    for name in NOT_KEPT if memory.enabled else ():
        if value := getattr(memory, name):
            yield f"--memory-{name.replace('_', '-')} {value}, which is of trainings"
