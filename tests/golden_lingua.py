"""The golden whole models: their parameters, tensors, our configuration, weights by our names."""

import dataclasses
import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from megatron_memory.config import Config, ParallelConfig
from megatron_memory.conversion.lazy import from_memory
from megatron_memory.conversion.lingua import lingua_rules
from megatron_memory.conversion.lingua_params import config_of
from megatron_memory.conversion.rules import to_ours

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
    """Our configuration of a case, as a conversion reads it, with the schedule that its training
    followed, which params.json does not tell."""
    params, tensors, _ = load_case(name)
    weights = {n: from_memory(t) for n, t in _under(tensors, "init.").items()}
    config = config_of(params, weights, GOLDEN_MODELS / name / "params.json")
    return dataclasses.replace(
        config,
        parallel=ParallelConfig(**parallel),
        optimizer=dataclasses.replace(config.optimizer, lr_decay_iters=SCHEDULE_STEPS),
        training=dataclasses.replace(
            config.training, micro_batch_size=2, train_iters=SCHEDULE_STEPS, seed=1234
        ),
    )


def full_weights(name: str, source: dict[str, Tensor], prefix: str = "init.") -> dict[str, Tensor]:
    """A case's weights under the names of our checkpoints."""
    theirs = {n: from_memory(t) for n, t in _under(source, prefix).items()}
    ours = to_ours(lingua_rules(case_config(name)), theirs, name)
    return {n: tensor.read() for n, tensor in ours.items()}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
