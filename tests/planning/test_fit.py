"""Runs whose parameters cannot fit end before they are made, with the flag that fixes it."""

import dataclasses
import re

import pytest

from megatron_memory.config import Config, load_config, parse_arguments
from megatron_memory.exceptions import ConfigurationError
from megatron_memory.planning.fit import check_parameters_fit
from megatron_memory.planning.memory import fullest, rank_memories
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.available_memory import available_bytes
from megatron_memory.runtime.distributed import initialize_distributed
from tests.distributed import run_ranks
from tests.tiny import tiny_config
from tools.scaling_tables import REPOSITORY

FILE = str(REPOSITORY / "examples" / "models" / "1.3b.yaml")
VOCAB = 32000


def _config(*flags: str) -> Config:
    return parse_arguments(["--config", FILE, "--dry-run", *flags])


def _parameter_bytes(config: Config, world_size: int) -> int:
    return fullest(rank_memories(config, world_size, VOCAB)).states.total


def test_what_fits_passes():
    config = _config()
    check_parameters_fit(config, 8, VOCAB, [_parameter_bytes(config, 8)])
    with pytest.raises(ConfigurationError):
        check_parameters_fit(config, 8, VOCAB, [_parameter_bytes(config, 8) - 1])


@pytest.mark.parametrize("half_keys, available", [(4096, 70e9), (4096, 120e9), (8192, 200e9)])
def test_the_size_named_is_the_smallest_that_fits(half_keys: int, available: float):
    config = _config("--memory-num-half-keys", str(half_keys))
    with pytest.raises(ConfigurationError, match="--memory-parallel-size") as error:
        check_parameters_fit(config, 64, VOCAB, [int(available)])
    size = int(re.search(r"give --memory-parallel-size (\d+)", str(error.value))[1])
    assert f"--memory-num-half-keys {half_keys}" in str(error.value)

    def fits(neighbours: int) -> bool:
        memory = dataclasses.replace(config.memory, parallel_size=neighbours)
        changed = dataclasses.replace(config, memory=memory)
        return _parameter_bytes(changed, 64) <= available

    assert size > 1 and fits(size)
    assert not any(fits(smaller) for smaller in range(1, size) if 64 % smaller == 0)


def test_a_distributed_optimizer_is_named_first():
    config = _config("--no-use-distributed-optimizer", "--no-overlap-param-gather")
    sharded = _parameter_bytes(_config(), 8)
    with pytest.raises(ConfigurationError, match="give --use-distributed-optimizer"):
        check_parameters_fit(config, 8, VOCAB, [sharded])
    with pytest.raises(
        ConfigurationError, match="give --memory-parallel-size 2 --use-distributed-optimizer"
    ):
        check_parameters_fit(config, 8, VOCAB, [sharded - 2**20])


def test_a_dense_model_is_split_by_tensor_parallelism():
    config = dataclasses.replace(
        load_config(FILE), memory=dataclasses.replace(_config().memory, layers=None)
    )
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, dry_run=True)
    )
    with pytest.raises(ConfigurationError, match="give --tensor-model-parallel-size 2"):
        check_parameters_fit(config, 8, VOCAB, [_parameter_bytes(config, 8) - 2**20])


def test_nothing_fits():
    with pytest.raises(ConfigurationError, match="take more ranks, or a smaller"):
        check_parameters_fit(_config(), 1, VOCAB, [2**30])


def test_each_pipeline_rank_is_held_to_what_it_has_itself():
    """One rank has the table; the others need far less, and may have far less."""
    config = _config(
        "--pipeline-model-parallel-size", "4", "--num-layers-per-virtual-pipeline-stage", "2"
    )
    needs = [rank.states.total for rank in rank_memories(config, 8, VOCAB)]
    assert max(needs) > 3 * min(needs)
    check_parameters_fit(config, 8, VOCAB, needs)
    for rank in range(4):
        short = [need - (i == rank) for i, need in enumerate(needs)]
        with pytest.raises(ConfigurationError, match=f"on pipeline rank {rank} on each rank"):
            check_parameters_fit(config, 8, VOCAB, short)


def _available(config: Config) -> list[int]:
    backend = select_backend("cpu")
    initialize_distributed(config, backend)
    return available_bytes(backend)


def test_a_cpu_is_shared_by_its_ranks_but_not_by_pipeline_ranks():
    (alone,) = run_ranks(_available, 1, tiny_config(None))[0]
    first, second = run_ranks(_available, 2, tiny_config(None))
    # Other programs come and go between the calls.
    assert first == second == [pytest.approx(alone / 2, rel=0.3)]
    pipeline = tiny_config(None, {"pipeline_model_parallel_size": 2})
    first, second = run_ranks(_available, 2, pipeline)
    assert first == second and first == pytest.approx([alone, alone], rel=0.3)
