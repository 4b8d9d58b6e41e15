"""What a training draws: random slots and dropout masks, by seed, step and data-parallel rank."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megatron_memory.config import Config
from megatron_memory.memory import layer, routing
from tests.distributed import run_ranks
from tests.training.tiny_runs import change, run, tiny_config

pytestmark = pytest.mark.distributed

MEMORY = {"layers": "0,1", "num_heads": 2, "top_k": 4, "num_half_keys": 8, "value_dim": 64}
RANDOM = {"num_random_values": 2, "query_dropout": 0.5, "value_dropout": 0.5}
DROPOUT = {"hidden_dropout": 0.5, "attention_dropout": 0.0}

Draws = dict[int, dict[str, list[torch.Tensor]]]
"""By iteration, what each kind drew, in order."""


def _recording_dropout(seen: list[torch.Tensor]) -> Callable:
    dropout = F.dropout

    def drop(x, p=0.5, training=True, inplace=False):
        y = dropout(x, p, training, inplace)
        if p and training:
            seen.append(y.detach() != 0)
        return y

    return drop


class _Functional:
    """torch.nn.functional, with its dropout recorded."""

    def __init__(self, seen: list[torch.Tensor]):
        self.dropout = _recording_dropout(seen)

    def __getattr__(self, name: str):
        return getattr(F, name)


def _record_draws() -> dict[str, list[torch.Tensor]]:
    """In this process, from now on: slots, and masks of queries, values and hidden states."""
    seen: dict[str, list[torch.Tensor]] = {"slots": [], "queries": [], "values": [], "hidden": []}
    routing.F, layer.F = _Functional(seen["queries"]), _Functional(seen["values"])
    torch.nn.functional.dropout = _recording_dropout(seen["hidden"])
    forward = routing.MemoryRouter.forward

    def route(router, x):
        result = forward(router, x)
        seen["slots"].extend([result.indices[..., 4:]] * (result.indices.shape[-1] > 4))
        return result

    routing.MemoryRouter.forward = route
    return seen


def draws_of(configs: list[Config]) -> list[Draws]:
    """Of several runs, one after the other."""
    seen = _record_draws()
    results = []
    for config in configs:
        draws: Draws = {}

        def on_step(iteration: int, result: object, draws: Draws = draws) -> None:
            draws[iteration] = {kind: list(calls) for kind, calls in seen.items()}
            for calls in seen.values():
                calls.clear()

        run(config, on_step)
        assert not any(seen.values()), "an evaluation draws"
        results.append(draws)
    return results


def _are_equal(ours: dict, theirs: dict, *kinds: str) -> bool:
    return all(
        len(ours[kind]) == len(theirs[kind]) > 0 and all(map(torch.equal, ours[kind], theirs[kind]))
        for kind in kinds
    )


def test_ranks_and_steps_draw_their_own_and_restarts_the_same(dataset: str, tmp_path: Path):
    """Two data-parallel ranks, memory-parallel neighbours too; then two tensor-parallel ranks,
    which draw what one rank draws. Evaluations between the steps draw nothing."""
    kinds = ("slots", "queries", "values", "hidden")
    training = {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 4}
    one = tiny_config(dataset, memory=MEMORY | RANDOM, model=DROPOUT, training=training)
    one = change(one, "training", eval_iters=0)
    whole = change(one, "memory", parallel_size=2)
    save = str(tmp_path / "save")
    half = change(change(whole, "checkpoint", save=save), "training", exit_interval=2)
    half = change(half, "training", eval_iters=1, eval_interval=1)
    rest = change(whole, "checkpoint", load=save)
    tensor = change(one, "parallel", tensor_model_parallel_size=2)
    ranks = run_ranks(draws_of, 2, [whole, half, rest, tensor])
    ((alone,),) = run_ranks(draws_of, 1, [one])
    for draws, first, second, tensor_draws in ranks:
        assert (first | second).keys() == draws.keys() == {1, 2, 3, 4}
        for iteration, restarted in (first | second).items():
            assert _are_equal(draws[iteration], restarted, *kinds)
            # Value dropout is of the rank's own columns.
            assert _are_equal(alone[iteration], tensor_draws[iteration], "slots", "queries")
        for kind in kinds:
            assert not _are_equal(draws[1], draws[2], kind)
    for iteration in alone:
        ours, theirs = (draws[iteration] for draws, *_ in ranks)
        for kind in kinds:
            pairs = zip(ours[kind], theirs[kind], strict=True)
            assert not any(torch.equal(a, b) for a, b in pairs), kind
            # One rank has the microbatches of both, its first is the first rank's.
            assert torch.equal(ours[kind][0], alone[iteration][kind][0])
