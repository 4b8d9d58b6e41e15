"""Whole tensors into a model and out of it."""

import pytest
import torch

from megatron_memory.exceptions import CheckpointError
from megatron_memory.model.full_weights import load_full_weights
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from tests.distributed import run_ranks
from tests.full_tensors import assemble, local_weights
from tests.tiny import tiny_batch, tiny_config, tiny_model

CONFIGS = {
    "memory+": tiny_config("memory+", memory={"gated": True, "qk_norm": True, "value_dim": 24}),
    "pkm": tiny_config("pkm", model={"untie_embeddings_and_output_weights": True}),
    "peer": tiny_config("peer", memory={"share_scope": "layer"}),
    "dense": tiny_config(None),
    "experts": tiny_config(None, model={"num_experts": 2}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(one_rank, name: str):
    config = CONFIGS[name]
    source, target = tiny_model(config, seed=1), tiny_model(config, seed=2)
    weights = assemble([local_weights(source)])
    load_full_weights(target, weights)
    for (parameter_name, ours), theirs in zip(
        target.named_parameters(), source.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), parameter_name
    assert torch.equal(target(**tiny_batch()), source(**tiny_batch()))


def _load(config, weights: dict) -> dict:
    """This rank's parts after loading whole tensors, and the losses."""
    initialize_distributed(config, select_backend("cpu"))
    model = tiny_model(config, seed=2)
    load_full_weights(model, weights)
    return {"weights": local_weights(model), "losses": model(**tiny_batch()).detach()}


@pytest.mark.distributed
def test_each_of_two_ranks_takes_its_part(one_rank):
    source = tiny_model(CONFIGS["memory+"], seed=1)
    weights = assemble([local_weights(source)])
    config = tiny_config(
        "memory+",
        {"tensor_model_parallel_size": 2},
        memory={"gated": True, "qk_norm": True, "value_dim": 24},
    )
    ranks = run_ranks(_load, 2, config, weights)
    whole = assemble([rank["weights"] for rank in ranks])
    assert whole.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(whole[name], tensor), name
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], source(**tiny_batch()), rtol=1e-5, atol=1e-5)


def test_weights_take_the_models_dtype(one_rank):
    model = tiny_model(CONFIGS["memory+"])
    weights = {k: v.double() for k, v in assemble([local_weights(model)]).items()}
    load_full_weights(model, weights)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "name", ["memory.shared.values.weight", "decoder.layers.0.mlp.linear_fc1.weight"]
)
@pytest.mark.parametrize("problem", ["missing", "shape", "unknown"])
def test_weights_that_do_not_fit_are_named(one_rank, problem: str, name: str):
    model = tiny_model(CONFIGS["memory+"])
    weights = assemble([local_weights(model)])
    shape = list(weights[name].shape)
    if problem == "missing":
        del weights[name]
        message = f"weight {name} is missing"
    elif problem == "shape":
        weights[name] = weights[name][:-1]
        message = f"weight {name} has shape {[shape[0] - 1, shape[1]]}, the model wants {shape}"
    else:
        weights["a.b"] = weights["c.d"] = torch.zeros(1)
        message = "weights that the model does not have: a.b, c.d"
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(CheckpointError) as raised:
        load_full_weights(model, weights)
    assert str(raised.value) == message
    # Nothing is loaded in part.
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
