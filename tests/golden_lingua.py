"""The golden whole models: our configuration of a case, and its weights under our names."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_memory.config import (
    Config,
    MemoryConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
)

GOLDEN_MODELS = Path(__file__).parent / "golden" / "lingua"
CASES = ("memory_plus", "memory_gqa_vdim", "peer")
SCHEDULE_STEPS = 60
BATCH_SIZE = 4


def load_case(name: str) -> tuple[dict, dict[str, Tensor], list[dict]]:
    """Parameters, tensors and trajectory of a case."""
    folder = GOLDEN_MODELS / name
    params = json.loads((folder / "params.json").read_text())
    trajectory = json.loads((folder / "trajectory.json").read_text())
    return params, load_file(folder / "reference.safetensors"), trajectory


def case_config(name: str, **parallel) -> Config:
    """Our configuration of a case."""
    params, tensors, _ = load_case(name)
    model, keys, optim = params["model"], params["model"]["productkey_args"], params["optim"]
    value_dim = keys["mem_v_dim"] if keys["mem_v_dim"] > 0 else model["dim"]
    dense_layer = "init.layers.0.feed_forward.w1.weight"
    return Config(
        model=ModelConfig(
            num_layers=model["n_layers"],
            hidden_size=model["dim"],
            ffn_hidden_size=tensors[dense_layer].shape[0],
            num_attention_heads=model["n_heads"],
            num_query_groups=model["n_kv_heads"] or model["n_heads"],
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
        ),
        memory=MemoryConfig(
            layers=keys["layers"],
            variant="peer" if keys["peer_variant"] else "memory+",
            num_heads=keys["mem_heads"],
            top_k=keys["mem_knn"],
            num_half_keys=keys["mem_n_keys"],
            key_dim=keys["mem_k_dim"],
            value_dim=value_dim,
            gated=keys["mem_gated"],
            value_lr=keys["value_fixed_lr"],
            value_weight_decay=optim["weight_decay"],
            value_clip_grad=optim["clip"],
        ),
        parallel=ParallelConfig(**parallel),
        optimizer=OptimizerSettings(
            lr=optim["lr"],
            min_lr=optim["lr"] * optim["lr_min_ratio"],
            lr_decay_style=optim["scheduler"],
            lr_decay_iters=SCHEDULE_STEPS,
            lr_warmup_iters=optim["warmup"],
            weight_decay=optim["weight_decay"],
            apply_weight_decay_to_all=True,
            adam_beta1=optim["beta1"],
            adam_beta2=optim["beta2"],
            adam_eps=optim["epsilon"],
            clip_grad=optim["clip"],
        ),
        training=TrainingConfig(
            micro_batch_size=2, global_batch_size=BATCH_SIZE, train_iters=SCHEDULE_STEPS
        ),
    )


def full_weights(name: str, source: dict[str, Tensor], prefix: str = "init.") -> dict[str, Tensor]:
    """A case's weights under the names of our checkpoints."""
    config = case_config(name)
    take = {k.removeprefix(prefix): v for k, v in source.items() if k.startswith(prefix)}
    weights = {
        "embedding.word_embeddings.weight": take["tok_embeddings.weight"],
        "decoder.final_layernorm.weight": take["norm.weight"],
        "output_layer.weight": take["output.weight"],
    }
    for layer in range(config.model.num_layers):
        theirs, ours = f"layers.{layer}.", f"decoder.layers.{layer}."
        attention = {k: take[f"{theirs}attention.w{k}.weight"] for k in "qkvo"}
        weights[f"{ours}self_attention.linear_qkv.weight"] = _fuse_qkv(attention, config)
        weights[f"{ours}self_attention.linear_qkv.layer_norm_weight"] = take[
            f"{theirs}attention_norm.weight"
        ]
        weights[f"{ours}self_attention.linear_proj.weight"] = attention["o"]
        feed_forward = {
            k.removeprefix(f"{theirs}feed_forward."): v
            for k, v in take.items()
            if k.startswith(f"{theirs}feed_forward.")
        }
        norm = take[f"{theirs}ffn_norm.weight"]
        convert = _dense if "w1.weight" in feed_forward else _memory
        weights.update(convert(ours, feed_forward, norm, config))
    return weights


def _fuse_qkv(attention: dict[str, Tensor], config: Config) -> Tensor:
    """Megatron's order: for each key/value head its query heads, its key, its value."""
    groups, channels = config.model.num_query_groups, config.model.kv_channels
    heads = [attention[k].view(groups, -1, channels, config.model.hidden_size) for k in "qkv"]
    return torch.cat(heads, dim=1).reshape(-1, config.model.hidden_size)


def _dense(ours: str, theirs: dict[str, Tensor], norm: Tensor, config: Config) -> dict:
    return {
        f"{ours}mlp.linear_fc1.layer_norm_weight": norm,
        f"{ours}mlp.linear_fc1.weight": torch.cat((theirs["w1.weight"], theirs["w3.weight"])),
        f"{ours}mlp.linear_fc2.weight": theirs["w2.weight"],
    }


_MEMORY_NAMES = {
    "mlp.router.query": "query_proj.query_mlps.0",
    "mlp.linear_fc1": "swilu_projection",
    "mlp.linear_fc2": "value_proj",
    "mlp.gate": "gating",
}


def _memory(ours: str, theirs: dict[str, Tensor], norm: Tensor, config: Config) -> dict:
    memory = config.memory
    shape = (memory.num_heads, 2, memory.num_half_keys, memory.key_dim // 2)
    weights = {
        f"{ours}pre_mlp_layernorm.weight": norm,
        f"{ours}mlp.router.keys": theirs["keys"].view(shape),
    }
    for our_name, their_name in _MEMORY_NAMES.items():
        for kind in ("weight", "bias"):
            if f"{their_name}.{kind}" in theirs:
                weights[f"{ours}{our_name}.{kind}"] = theirs[f"{their_name}.{kind}"]
    for table in ("values", "values_u", "values_v"):
        if f"{table}.weight" in theirs:
            weights[f"memory.shared.{table}.weight"] = theirs[f"{table}.weight"]
    return weights
