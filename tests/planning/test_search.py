"""The search for layouts: all legal, all fit, none faster is left out of a small space."""

import dataclasses

from megatron_memory.config import check_config, load_config, parse_arguments
from megatron_memory.planning.hardware import GPUS
from megatron_memory.planning.plan import USABLE, largest_memory, plan
from megatron_memory.planning.roofline import Cluster
from megatron_memory.planning.search import best_plans, flags_text, padded_size
from tools.scaling_tables import REPOSITORY

MODELS = REPOSITORY / "examples" / "models"
NODE = Cluster(gpu=GPUS["h100"], num_gpus=8)


def test_plans_fit_and_pass_every_check():
    file = str(MODELS / "1.3b.yaml")
    config = load_config(file)
    plans = best_plans(config, NODE, 32000)
    assert len(plans) == 5
    times = [found.time.with_overlap for found in plans]
    assert times == sorted(times)
    for found in plans:
        assert found.memory.total <= USABLE * NODE.gpu.memory
        check_config(found.config, 8)
        again = parse_arguments(
            ["--config", file, "--dry-run", *flags_text(config, found.config).split()]
        )
        assert dataclasses.replace(again, training=found.config.training) == found.config


def test_a_smaller_gpu_splits_more():
    """Half of the memory: what fits has more ranks to a copy of the table, or recompute."""
    config = load_config(MODELS / "1.3b.yaml")
    memory = dataclasses.replace(config.memory, num_half_keys=2048)
    config = dataclasses.replace(config, memory=memory)
    small = dataclasses.replace(NODE, gpu=dataclasses.replace(NODE.gpu, memory=24e9))
    assert best_plans(config, dataclasses.replace(small, num_gpus=2), 32000) == []
    for found in best_plans(config, small, 32000):
        split = found.config.parallel.tensor_model_parallel_size * found.config.memory.parallel_size
        assert split >= 4 or found.config.parallel.pipeline_model_parallel_size > 1


def test_largest_memory_is_the_last_that_fits():
    found = best_plans(load_config(MODELS / "373m.yaml"), NODE, 32000, most=1)[0]
    padded = padded_size(found.config, 32000)
    half_keys = largest_memory(found.config, NODE, padded)
    assert half_keys >= 1024 and half_keys % 32 == 0

    def fits(number: int) -> bool:
        memory = dataclasses.replace(found.config.memory, num_half_keys=number)
        changed = dataclasses.replace(found.config, memory=memory)
        return plan(changed, NODE, padded).fits(NODE)

    assert fits(half_keys) and not fits(half_keys + 32)
