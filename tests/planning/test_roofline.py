"""Bytes on rings and links, and what the step's time follows from."""

import dataclasses

import pytest

from megatron_memory.config import Config, load_config
from megatron_memory.planning.groups import Group, groups, network_share, sent_bytes
from megatron_memory.planning.hardware import GPUS
from megatron_memory.planning.roofline import Cluster, step_time
from megatron_memory.planning.schedule import most_held
from tests.planning.test_memory import TP2_SP, _config
from tools.scaling_tables import REPOSITORY

VOCAB = 32000
H100 = Cluster(gpu=GPUS["h100"], num_gpus=64)


def _model(**parallel) -> Config:
    config = load_config(REPOSITORY / "examples" / "models" / "1.3b.yaml")
    memory = {"parallel_size": parallel.pop("memory", 1)}
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, **parallel),
        memory=dataclasses.replace(config.memory, **memory),
    )


def test_a_ring_sends_all_but_the_own_part():
    assert sent_bytes("all-gather", 800, 8) == sent_bytes("reduce-scatter", 800, 8) == 700
    assert sent_bytes("all-reduce", 800, 8) == 1400
    assert sent_bytes("all-to-all", 800, 8) == 700
    assert sent_bytes("send", 800, 8) == 800


@pytest.mark.parametrize(
    "size, stride, ring, all_to_all",
    [
        (8, 1, 0.0, 0.0),  # a node
        (16, 1, 1 / 8, 8 / 15),  # two nodes
        (8, 8, 1.0, 1.0),  # a GPU of each of eight nodes
        (8, 2, 1 / 4, 4 / 7),
    ],
)
def test_share_of_the_network(size: int, stride: int, ring: float, all_to_all: float):
    group = Group(name="data", size=size, stride=stride)
    assert network_share("all-gather", group, 8) == ring
    assert network_share("all-to-all", group, 8) == pytest.approx(all_to_all)


def test_groups_are_megatrons():
    config = _config(parallel=TP2_SP, memory={"parallel_size": 4}, batch=64)
    found = {name: (g.size, g.stride) for name, g in groups(config, 32).items()}
    assert found["neighbours"] == (4, 2) and found["memory"] == (8, 1)
    assert found["data"] == (16, 2) and found["copies"] == (4, 8)


def test_faster_parts_shorten_their_part_alone():
    config = _model(tensor_model_parallel_size=2, sequence_parallel=True, memory=8)
    plain = step_time(config, H100, VOCAB)
    changes = {
        "bf16_flops": {"matrices"},
        "bandwidth": {"tables", "others", "optimizer"},
        "nvlink": {"nvlink", "hidden"},
        "network": {"network", "hidden"},
    }
    for field, parts in changes.items():
        twice = dataclasses.replace(H100.gpu, **{field: 2 * getattr(H100.gpu, field)})
        fast = step_time(config, dataclasses.replace(H100, gpu=twice), VOCAB)
        for part in ("matrices", "tables", "others", "optimizer", "nvlink", "network", "hidden"):
            changed = getattr(fast, part) < getattr(plain, part)
            assert changed == (part in parts), (field, part)


def test_no_more_than_the_peak_is_computed():
    """Alone, matrix products would make the MFU the efficiency that is assumed for them."""
    time = step_time(_model(), H100, VOCAB)
    assert time.with_overlap < time.without_overlap
    assert 0.65 * time.matrices / time.with_overlap == pytest.approx(time.mfu, rel=0.01)


def test_a_pipeline_waits_less_when_interleaved():
    plain = step_time(_model(pipeline_model_parallel_size=4), H100, VOCAB)
    layers = {"num_layers_per_virtual_pipeline_stage": 2}
    interleaved = step_time(_model(pipeline_model_parallel_size=4, **layers), H100, VOCAB)
    assert 0 < interleaved.idle < plain.idle / 2


def test_microbatches_in_flight():
    """1F1B: as many as there are stages from here to the end."""
    for rank, number in enumerate((4, 3, 2, 1)):
        assert most_held([10], rank=rank, num_ranks=4, num_microbatches=16) == (
            10 * number,
            (number,),
        )
    assert most_held([10], rank=0, num_ranks=4, num_microbatches=2) == (20, (2,))
    # Interleaved: the first rank computes 2 * 3 + 4 forward passes before the first backward one.
    most, held = most_held([10, 10], rank=0, num_ranks=4, num_microbatches=16)
    assert sum(held) == 11 and most == 110
