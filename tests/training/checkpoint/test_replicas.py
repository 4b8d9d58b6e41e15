"""Copies that several ranks hold: a rank whose copy has drifted is named, and nothing is saved."""

import itertools
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_memory.config import Config, check_config
from megatron_memory.exceptions import TrainingError
from megatron_memory.optimizer.states import states_by_parameter
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from megatron_memory.training import finite, trainer
from megatron_memory.training.checkpoint import folders, replicas
from megatron_memory.training.checkpoint.replicas import fingerprint
from megatron_memory.training.setup import TrainingSetup, build_training_setup
from tests.distributed import run_ranks
from tests.training.tiny_runs import VOCAB, change, run, tiny_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_a_fingerprint_changes_with_every_element(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(replicas, "_AT_ONCE", 8)
    tensor = torch.arange(35).view(5, 7).to(dtype)
    before = {int(fingerprint(tensor))}
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for place in range(35):
        for bit in range(8 * dtype.itemsize - 1):
            changed = tensor.clone()
            changed.view(-1).view(bits)[place] ^= 1 << bit
            assert int(fingerprint(changed)) not in before
    swapped = tensor.view(-1)[torch.randperm(35, generator=torch.Generator().manual_seed(1))]
    assert int(fingerprint(swapped)) not in before
    assert int(fingerprint(tensor.clone())) in before
    parts = tensor.view(-1)[:32].view(4, 8)
    assert int(fingerprint(parts)) != int(fingerprint(parts[[1, 0, 2, 3]]))
    assert int(fingerprint(tensor.view(-1)[:0])) == 0
    # Where in a buffer a copy begins does not matter, and neither does how large it is.
    shifted = torch.cat((tensor.view(-1)[:1], tensor.view(-1)))[1:]
    assert int(fingerprint(shifted)) in before
    large = torch.arange(8000).remainder(100).to(dtype)
    prints = {int(fingerprint(large.roll(8 * part))) for part in range(100)}
    assert len(prints) == 25
    # The last digits of two neighbours, as another order of a sum would change them.
    small = torch.zeros(16, dtype=torch.int64)
    for one, other in itertools.product(range(-4, 5), repeat=2):
        small[0], small[1] = one, other
        prints.add(int(fingerprint(small)))
    assert len(prints) == 25 + 81 and -(1 << 63) <= min(prints) <= max(prints) < 1 << 63


@torch.no_grad()
def _drift(setup: TrainingSetup, what: str) -> str:
    """Change one bit of this rank's copy; returns the parameter's name."""
    named = dict(finite.named_parameters(setup))
    name, kind = what.split()
    tied = ("embedding.word_embeddings.weight", "output_layer.weight")
    name = next(k for k in named if k.endswith(name) or (name == "embeddings" and k in tied))
    tensor = named[name].data
    if kind != "weight":
        own = states_by_parameter(setup.optimizer, [named[name]])
        tensor = next(states for _, states in own)[kind]
    tensor.view(-1)[0:1].view(torch.int32 if tensor.element_size() == 4 else torch.int16)[0] ^= 1
    return name


def _told(config: Config, drifts: list[tuple[str, int, int]], save: str) -> list[str]:
    """How runs end in which a rank's copy drifts; the third is the step of the drift."""
    return [
        _run_with_drift(config, *drift, save=f"{save}/{number}")
        for number, drift in enumerate(drifts)
    ]


def _run_with_drift(config: Config, what: str, rank: int, at: int, save: str) -> str:
    train_step, steps = trainer.train_step, [0]

    def drifting(setup, *args):
        result = train_step(setup, *args)
        steps[0] += 1
        if steps[0] == at and torch.distributed.get_rank() == rank:
            _drift(setup, what)
        return result

    trainer.train_step = drifting
    problem = "nothing"
    config = change(config, "checkpoint", save=save, save_interval=2)
    try:
        run(change(config, "training", train_iters=4))
    except TrainingError as error:
        problem = str(error)
    finally:
        trainer.train_step = train_step
    torch.distributed.barrier()
    return f"{problem} saved {folders.saved_iterations(Path(save))}"


LAYOUTS = {
    "tp2": (
        2,
        dict(tensor_model_parallel_size=2, sequence_parallel=True),
        [
            ("final_layernorm.weight weight", 1, "tensor-parallel copies"),
            ("final_layernorm.weight exp_avg", 1, "tensor-parallel copies"),
        ],
    ),
    "dp3": (
        3,
        dict(),
        [
            ("layers.0.mlp.linear_fc1.weight weight", 2, "data-parallel copies"),
            ("values.weight weight", 0, "data-parallel copies"),
            ("values.weight exp_avg_sq", 1, "data-parallel copies"),
        ],
    ),
    "dp2 distributed": (
        2,
        dict(use_distributed_optimizer=True),
        [("values.weight weight", 1, "data-parallel copies")],
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_drifts_is_named_and_not_saved(layout: str, dataset: str, tmp_path: Path):
    ranks, parallel, cases = LAYOUTS[layout]
    config = change(tiny_config(dataset), "parallel", **parallel)
    batch = {"global_batch_size": 12} if ranks == 3 else {}
    config = change(config, "training", check_replicas_interval=3, **batch)
    # At step 3 the interval finds it; at step 4, before the second save.
    drifts = [(what, rank, at) for what, rank, _ in cases for at in (3, 4)]
    every = run_ranks(
        _told, ranks, config, [("final_layernorm.weight weight", 9, 3), *drifts], str(tmp_path)
    )
    assert all(told == every[0] for told in every)
    undisturbed, *told = every[0]
    assert undisturbed == "nothing saved [2, 4]"
    for (what, rank, at), message in zip(drifts, told, strict=True):
        copies = next(text for known, _, text in cases if known == what)
        name, kind = what.split()
        assert message.startswith(f"iteration {at}: copies of weights are not equal"), message
        named = f"rank {rank} of the" if ranks == 3 else "ranks 0, 1 of the"
        assert f"{named} {ranks} {copies}" in message, message
        assert (f"{name} ({kind})" if kind != "weight" else name) in message
        assert message.endswith("saved [2]")


def _drift_each(config: Config, cases: list[tuple[str, int]]) -> list[str]:
    """What is said of copies without a training: nothing at first, then of each drift, fixed
    before the next."""
    check_config(config, torch.distributed.get_world_size())
    backend = select_backend("cpu")
    initialize_distributed(config, backend)
    setup = build_training_setup(config, backend, VOCAB)
    told = []
    for what, rank in [("nothing", -1), *cases]:
        for _ in range(2):  # the second flips the bit back
            if torch.distributed.get_rank() == rank:
                _drift(setup, what)
            try:
                replicas.check_replicas(setup, 1)
                told.append("nothing")
            except TrainingError as error:
                told.append(str(error))
    parallel_state.destroy_model_parallel()
    return told


POOLED = {
    "pp2 replicated pool and tied embeddings": (
        2,
        dict(pipeline_model_parallel_size=2),
        dict(layers="0,1", replicate_pool=True),
        [("values.weight weight", 1), ("embeddings weight", 0)],
        ["ranks 0, 1 of the 2 pipeline copies"] * 2,
    ),
    "m2 of dp4": (
        4,
        {},
        dict(parallel_size=2, value_dim=64),
        [("values.weight weight", 3), ("final_layernorm.weight weight", 2)],
        ["ranks 1, 3 of the 2 data-parallel copies", "rank 2 of the 4 data-parallel copies"],
    ),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", POOLED)
def test_copies_over_stages_and_neighbours(layout: str, dataset: str):
    ranks, parallel, memory, cases, expected = POOLED[layout]
    config = change(tiny_config(dataset, memory=memory), "parallel", **parallel)
    told = run_ranks(_drift_each, ranks, config, cases)
    assert all(heard == told[0] for heard in told)
    assert told[0][:2] == ["nothing", "nothing"]
    assert told[0][3::2] == ["nothing"] * len(cases)
    for message, words in zip(told[0][2::2], expected, strict=True):
        assert words in message
