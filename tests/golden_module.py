"""The golden cases of single memory layers, and our layers with their weights."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_memory.config import (
    Config,
    MemoryConfig,
    ModelConfig,
    OptimizerSettings,
    ParallelConfig,
    TrainingConfig,
)

GOLDEN_MODULES = Path(__file__).parent / "golden" / "module"


def golden_cases() -> list[str]:
    """Names of the cases."""
    return sorted(path.stem for path in GOLDEN_MODULES.glob("*.safetensors"))


def load_case(name: str) -> tuple[dict, dict[str, Tensor]]:
    """Options and tensors of a case."""
    with safe_open(GOLDEN_MODULES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["config"]), tensors


def case_config(options: dict, tensor_parallel_size: int, sequence_parallel: bool) -> Config:
    """Our configuration of a case: `layers` memory layers and nothing that matters beside them."""
    variant = (
        "peer"
        if options.get("peer_variant")
        else ("memory+" if options["swilu_projection"] else "pkm")
    )
    return Config(
        model=ModelConfig(
            num_layers=options["layers"],
            hidden_size=options["dim"],
            num_attention_heads=4,
            seq_length=options["seq"],
            normalization="RMSNorm",
            position_embedding_type="rope",
        ),
        memory=MemoryConfig(
            layers=",".join(str(i) for i in range(options["layers"])),
            variant=variant,
            num_heads=options["mem_heads"],
            top_k=options["mem_knn"],
            num_half_keys=options["mem_n_keys"],
            key_dim=options["mem_k_dim"],
            value_dim=options.get("mem_v_dim", options["dim"]),
            gated=options.get("mem_gated", False),
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tensor_parallel_size, sequence_parallel=sequence_parallel
        ),
        optimizer=OptimizerSettings(lr=1e-3),
        training=TrainingConfig(micro_batch_size=1, global_batch_size=1, train_iters=1),
    )


def load_layer_(layer, tensors: dict[str, Tensor], position: int) -> None:
    """Copy a golden layer's weights, this rank's part of them, into ours and its tables."""
    for parameter, value in _pairs(layer, tensors, f"param.{position}."):
        with torch.no_grad():
            parameter.copy_(value)


def golden_gradients(layer, tensors: dict[str, Tensor], position: int) -> list[tuple]:
    """Our parameters of a layer, each with this rank's part of its golden gradient."""
    return _pairs(layer, tensors, f"grad.{position}.")


def _pairs(layer, tensors: dict[str, Tensor], prefix: str) -> list[tuple]:
    """(parameter, golden tensor) for everything that the file has of this layer."""
    router, group = layer.router, layer.group.tp
    pairs = [
        (router.query.weight, tensors[f"{prefix}query_proj.query_mlps.0.weight"]),
        (router.query.bias, tensors[f"{prefix}query_proj.query_mlps.0.bias"]),
        (router.keys, tensors[f"{prefix}keys"].view_as(router.keys)),
    ]
    if layer.linear_fc1 is not None:
        for name in ("weight", "bias"):
            golden = tensors[f"{prefix}swilu_projection.{name}"]
            pairs.append(
                (getattr(layer.linear_fc1, name), golden.chunk(group.size())[group.rank()])
            )
    if layer.linear_fc2 is not None:
        golden = tensors[f"{prefix}value_proj.weight"]
        pairs.append((layer.linear_fc2.weight, golden.chunk(group.size(), 1)[group.rank()]))
        pairs.append((layer.linear_fc2.bias, tensors[f"{prefix}value_proj.bias"]))
    if layer.gate is not None:
        pairs.append((layer.gate.weight, tensors[f"{prefix}gating.weight"]))
        pairs.append((layer.gate.bias, tensors[f"{prefix}gating.bias"]))
    for name in ("values", "values_u", "values_v"):
        if f"{prefix}{name}.weight" in tensors:  # a shared table stands once, under layer 0
            golden = tensors[f"{prefix}{name}.weight"].chunk(group.size(), 1)[group.rank()]
            pairs.append((layer.tables.get_submodule(name).weight, golden))
    return pairs
