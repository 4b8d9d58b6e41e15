"""The variants against their formulas, on one rank (others: tests/training/test_parity*)."""

import pytest
import torch
import torch.nn.functional as F

from megatron_memory.memory.layer import MemoryLayer
from megatron_memory.runtime.distributed import seed_everything
from tests.tiny import SEQUENCE, tiny_config, tiny_model

HEADS, TOP_K, HALF_KEYS, HIDDEN, SEQUENCES = 2, 4, 8, 32, 3
TOKENS = SEQUENCE * SEQUENCES

pytestmark = pytest.mark.usefixtures("one_rank")


def make_layer(variant: str, **memory) -> MemoryLayer:
    """The first memory layer of the tiny model, biases at random."""
    layer = tiny_model(tiny_config(variant, memory=memory)).memory_layers()[0]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return layer


def make_input() -> torch.Tensor:
    """[s, b, hidden]."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SEQUENCE, SEQUENCES, HIDDEN, generator=generator)


def run(layer: MemoryLayer, x: torch.Tensor) -> torch.Tensor:
    """Output with its bias, [T, hidden]."""
    output, bias = layer(x)
    assert output.shape == x.shape
    return (output if bias is None else output + bias).flatten(0, 1)


def read(layer: MemoryLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and weights [T, H * K] by the definition: all keys are built and all scores sorted."""
    x = x.flatten(0, 1)
    query = (x @ layer.router.query.weight.T + layer.router.query.bias).view(TOKENS, HEADS, -1)
    slots = torch.arange(HALF_KEYS**2)
    first, second = layer.router.keys.unbind(1)
    keys = torch.cat((first[:, slots // HALF_KEYS], second[:, slots % HALF_KEYS]), dim=-1)
    scores, indices = torch.einsum("thd,hnd->thn", query, keys).topk(TOP_K)
    return indices.flatten(1), scores.softmax(dim=-1).flatten(1)


def weighted_rows(layer: MemoryLayer, x: torch.Tensor) -> torch.Tensor:
    """y [T, D]: the weighted sum of rows, all heads together."""
    indices, weights = read(layer, x)
    return (weights[..., None] * layer.tables.values.weight[indices]).sum(dim=1)


def linear(module, x: torch.Tensor) -> torch.Tensor:
    return x @ module.weight.T + module.bias


def assert_close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    """fp32 sums of up to 32 terms in another order."""
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


def test_vanilla_is_the_definition():
    layer, x = make_layer("pkm"), make_input()
    assert layer.linear_fc1 is layer.linear_fc2 is layer.gate is None
    assert_close(run(layer, x), weighted_rows(layer, x))


@pytest.mark.parametrize("value_dim", [8, 24, 48])
def test_vanilla_projects_values_of_another_width(value_dim: int):
    layer, x = make_layer("pkm", value_dim=value_dim), make_input()
    assert layer.tables.values.weight.shape == (HALF_KEYS**2, value_dim)
    assert layer.linear_fc1 is None
    assert_close(run(layer, x), linear(layer.linear_fc2, weighted_rows(layer, x)))


@pytest.mark.parametrize("value_dim", [32, 24])
def test_memory_plus_is_gated_and_projected(value_dim: int):
    layer, x = make_layer("memory+", value_dim=value_dim), make_input()
    gate = linear(layer.linear_fc1, x.flatten(0, 1))
    y = weighted_rows(layer, x) * gate * torch.sigmoid(gate)
    assert_close(run(layer, x), linear(layer.linear_fc2, y))


def test_peer_reads_experts_of_one_neuron():
    layer, x = make_layer("peer"), make_input()
    indices, weights = read(layer, x)
    output = torch.zeros(TOKENS, HIDDEN)
    for token, features in enumerate(x.flatten(0, 1)):
        for slot, weight in zip(indices[token], weights[token], strict=True):
            neuron = F.gelu(layer.tables.values_u.weight[slot] @ features)
            output[token] += weight * neuron * layer.tables.values_v.weight[slot]
    assert_close(run(layer, x), output)


@pytest.mark.parametrize("variant", ["pkm", "memory+", "peer"])
def test_sigmoid_gate_multiplies_everything(variant: str):
    layer, x = make_layer(variant, gated=True), make_input()
    gated = run(layer, x)
    gate, layer.gate = layer.gate, None
    assert_close(gated, run(layer, x) * torch.sigmoid(linear(gate, x.flatten(0, 1))))


@pytest.mark.parametrize("variant", ["pkm", "memory+", "peer"])
def test_every_parameter_gets_a_gradient(variant: str):
    layer = make_layer(variant, gated=True, qk_norm=True, softmax_sink=True)
    run(layer, make_input()).square().sum().backward()
    parameters = dict(layer.named_parameters()) | dict(layer.tables.named_parameters())
    without = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    assert without == []


def test_value_dropout_drops_in_training_only():
    layer, x = make_layer("pkm", value_dropout=0.25), make_input()
    plain = run(layer.eval(), x)
    assert_close(plain, weighted_rows(layer, x))
    dropped = run(layer.train(), x)
    kept = dropped != 0
    assert_close(dropped[kept], plain[kept] / 0.75)
    # 1536 entries: the share dropped has a deviation of 0.011.
    assert (~kept).double().mean().item() == pytest.approx(0.25, abs=0.06)


def test_value_dropout_follows_the_seed_and_leaves_the_common_generator():
    layer, x = make_layer("pkm", value_dropout=0.25), make_input()
    outputs = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        before = torch.get_rng_state()
        outputs.append(run(layer, x))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_value_dropout_comes_before_the_projection():
    """Equal rows of W2 give equal outputs: nothing is dropped after it."""
    layer, x = make_layer("memory+", value_dropout=0.5), make_input()
    full = run(layer.eval(), x)
    with torch.no_grad():
        layer.linear_fc2.weight[1] = layer.linear_fc2.weight[0]
        layer.linear_fc2.bias[1] = layer.linear_fc2.bias[0]
    output = run(layer.train(), x)
    assert_close(output[:, 1], output[:, 0])
    assert not torch.isclose(output[:, 0], full[:, 0]).any()


def test_layer_does_not_own_the_table():
    layer = make_layer("memory+")
    assert not [name for name, _ in layer.named_parameters() if "values" in name]
    assert not [name for name in layer.state_dict() if "values" in name]


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_sharing(scope: str):
    model = tiny_model(tiny_config("memory+", memory={"share_scope": scope}))
    first, second = model.memory_layers()
    tables = model.memory.tables()
    if scope == "model":
        assert first.tables is second.tables
        assert [table.num_readers for table in tables] == [2]
    else:
        assert [table.num_readers for table in tables] == [1, 1]
        assert first.tables.values is tables[0]
        assert second.tables.values is tables[1]
        assert not torch.equal(tables[0].weight, tables[1].weight)


def test_peers_two_tables_differ():
    tables = make_layer("peer").tables
    assert not (tables.values_u.weight == tables.values_v.weight).any()


def test_initial_values():
    """The paper's released settings: see megatron_memory/memory/initialization.py."""
    config = tiny_config("memory+", memory={"num_half_keys": 64, "value_dim": 64, "gated": True})
    layer = tiny_model(config).memory_layers()[0]
    assert layer.tables.values.weight.std().item() == pytest.approx(64**-0.5, rel=0.01)
    query = layer.router.query
    bound = (6 / (HIDDEN + HEADS * 32)) ** 0.5  # Xavier, of all heads together
    assert 0.98 * bound < query.weight.abs().max() <= bound
    assert layer.router.keys.abs().max() <= 32**-0.5
    for module in (layer.linear_fc1, layer.linear_fc2):
        assert module.weight.std().item() == pytest.approx(HIDDEN**-0.5, rel=0.06)
    for module in (query, layer.linear_fc1, layer.linear_fc2, layer.gate):
        assert not module.bias.any()
