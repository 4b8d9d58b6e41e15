"""The cost of copied tables, as it is told, against the whole plan of the same run."""

import re

import pytest

from megatron_memory.planning.communication import rank_exchanges
from megatron_memory.planning.copies import copies_notes
from megatron_memory.planning.memory import rank_memories
from tests.tiny import VOCAB, tiny_config

PP2 = {"pipeline_model_parallel_size": 2}


def config(variant: str = "memory+", parallel: dict = PP2, **memory):
    # Untied, so that no other parameter has copies.
    return tiny_config(
        variant,
        parallel,
        memory={"num_half_keys": 256} | memory,
        model={"untie_embeddings_and_output_weights": True},
    )


@pytest.mark.parametrize("variant", ["memory+", "peer"])
@pytest.mark.parametrize("optimizer", [{}, {"use_distributed_optimizer": True}])
def test_cost_is_the_plans(variant: str, optimizer: dict):
    copied = config(variant, PP2 | optimizer, replicate_pool=True)
    (line,) = copies_notes(copied, 4)
    assert "layers 1, 3 is on pipeline ranks 0, 1" in line
    held, sent = (float(figure.replace(",", "")) for figure in re.findall(r"([\d,.]+) MiB", line))
    memory, *_ = rank_memories(copied, 4, VOCAB)
    assert held == pytest.approx(memory.values.total / 2**20, abs=0.1)
    exchanges = rank_exchanges(copied, 4, VOCAB)[0]
    planned = sum(e.sent for e in exchanges if e.purpose == "gradients of copies")
    assert planned > 0 and sent == pytest.approx(planned / 2**20, abs=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        {"share_scope": "layer"},
        {"share_scope": "stage"},
        {"parallel": {}, "replicate_pool": True},
        {"parallel": PP2 | {"num_virtual_stages_per_pipeline_rank": 2}, "replicate_pool": True},
    ],
)
def test_tables_on_one_rank_cost_nothing_more(settings: dict):
    assert list(copies_notes(config(**settings), 4)) == []
