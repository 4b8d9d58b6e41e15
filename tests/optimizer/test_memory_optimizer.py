"""Two optimizers with a norm and a clip each; learning rate and weight decay of every parameter."""

import math

import pytest
import torch

from megatron_memory.config import PrecisionConfig
from megatron_memory.optimizer import MemoryOptimizer
from megatron_memory.runtime import select_backend
from megatron_memory.training.setup import build_training_setup
from megatron_memory.training.wrapping import unwrap
from tests.tiny import VOCAB, tiny_config

pytestmark = pytest.mark.usefixtures("one_rank")

DENSE_GRADIENT, VALUE_GRADIENT = 0.5, 0.25


def make_setup(variant: str | None = "memory+", memory=None, precision=None, **settings):
    """Plain SGD: an update is the learning rate times the clipped gradient."""
    options = dict(optimizer="sgd", sgd_momentum=0.0, lr=0.1, weight_decay=0.0, lr_warmup_iters=0)
    config = tiny_config(
        variant,
        memory={"value_lr": 0.01} | (memory or {}),
        optimizer=options | settings,
        precision=precision or PrecisionConfig(),
    )
    return build_training_setup(config, select_backend("cpu"), padded_vocab_size=VOCAB)


def fill_gradients(setup) -> tuple[float, float]:
    """Constant gradients; the norms of both parts."""
    squares = {False: 0.0, True: 0.0}
    for parameter in unwrap(setup.model[0]).parameters():
        is_value = hasattr(parameter, "is_memory_value")
        gradient = VALUE_GRADIENT if is_value else DENSE_GRADIENT
        parameter.main_grad.fill_(gradient)
        squares[is_value] += parameter.numel() * gradient**2
    return math.sqrt(squares[False]), math.sqrt(squares[True])


def weights(setup) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in unwrap(setup.model[0]).named_parameters()}


@pytest.mark.parametrize("value_clip", [0.0, 0.3, 1e6])
@pytest.mark.parametrize("clip", [0.0, 2.0, 1e6])
def test_each_part_is_clipped_by_its_own_norm(clip: float, value_clip: float):
    setup = make_setup(memory={"value_clip_grad": value_clip}, clip_grad=clip)
    assert isinstance(setup.optimizer, MemoryOptimizer)
    dense_norm, value_norm = fill_gradients(setup)
    assert dense_norm != pytest.approx(value_norm, rel=0.1)
    setup.scheduler.step(setup.config.training.global_batch_size)
    for group in setup.optimizer.param_groups:
        group["lr"] = 1.0
    before = weights(setup)
    succeeded, grad_norm, num_zeros = setup.optimizer.step()
    assert (succeeded, num_zeros) == (True, None)
    assert grad_norm == pytest.approx(dense_norm, rel=1e-5)
    assert setup.optimizer.value_grad_norm == pytest.approx(value_norm, rel=1e-5)
    dense_update = DENSE_GRADIENT * (clip / dense_norm if 0 < clip < dense_norm else 1)
    value_update = VALUE_GRADIENT * (value_clip / value_norm if 0 < value_clip < value_norm else 1)
    for name, after in weights(setup).items():
        update = value_update if name.startswith("memory.") else dense_update
        torch.testing.assert_close(
            before[name] - after, torch.full_like(after, update), rtol=1e-3, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("precision", [PrecisionConfig(), PrecisionConfig(bf16=True)], ids=str)
def test_peers_two_tables_share_one_norm(precision: PrecisionConfig):
    setup = make_setup("peer", precision=precision)
    _, value_norm = fill_gradients(setup)
    setup.optimizer.step()
    tables = unwrap(setup.model[0]).memory.tables()
    assert len(tables) == 2
    assert value_norm == VALUE_GRADIENT * math.sqrt(2 * tables[0].weight.numel())
    assert setup.optimizer.value_grad_norm == pytest.approx(value_norm, rel=1e-5)


@pytest.mark.parametrize("part", [0, 1], ids=["dense", "values"])
def test_a_skipped_step_changes_nothing(monkeypatch, part: int):
    """As where an optimizer of Megatron's finds that gradients overflowed, in either part."""
    setup = make_setup()
    fill_gradients(setup)
    setup.optimizer.step()
    assert setup.optimizer.value_grad_norm is not None
    monkeypatch.setattr(setup.optimizer.chained_optimizers[part], "prepare_grads", lambda: True)
    before = weights(setup)
    assert setup.optimizer.step()[0] is False
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(setup).items())


def groups_by_name(setup) -> dict[str, dict]:
    """Each parameter's group; fp32 without the distributed optimizer holds the model's own."""
    names = {parameter: name for name, parameter in unwrap(setup.model[0]).named_parameters()}
    return {
        names[parameter]: group
        for group in setup.optimizer.param_groups
        for parameter in group["params"]
    }


def test_schedule_of_both_learning_rates():
    """Linear warm-up and decay: the values have their own peak and floor, and the same shape."""
    setup = make_setup(
        lr=0.1,
        min_lr=0.02,
        lr_warmup_iters=2,
        lr_decay_iters=6,
        memory={"value_lr": 0.01, "value_min_lr": 0.001},
    )
    seen = []
    for _ in range(8):
        groups = groups_by_name(setup)
        table = groups.pop("memory.shared.values.weight")
        (rate,) = {group["lr"] for group in groups.values()}
        seen.append((rate, table["lr"]))
        setup.scheduler.step(setup.config.training.global_batch_size)
    shares = [0.0, 0.5]  # of the peak
    assert seen[:2] == [pytest.approx((0.1 * s, 0.01 * s)) for s in shares]
    shares = [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]  # of the way from floor to peak
    wanted = [(0.02 + 0.08 * s, 0.001 + 0.009 * s) for s in shares]
    assert seen[2:] == [pytest.approx(pair) for pair in wanted]


def test_the_values_floor_follows_the_others():
    setup = make_setup(lr=0.1, min_lr=0.02)
    assert groups_by_name(setup)["memory.shared.values.weight"]["min_lr"] == pytest.approx(0.002)


@pytest.mark.parametrize("for_all", [False, True])
def test_weight_decay_of_each_parameter(for_all: bool):
    setup = make_setup(
        memory={"value_weight_decay": 0.03, "qk_norm": True, "softmax_sink": True, "gated": True},
        weight_decay=0.1,
        apply_weight_decay_to_all=for_all,
    )
    decay = {name: group["weight_decay"] for name, group in groups_by_name(setup).items()}
    assert decay.pop("memory.shared.values.weight") == 0.03
    parameters = dict(unwrap(setup.model[0]).named_parameters())
    for name, value in decay.items():
        assert value == (0.1 if for_all or parameters[name].dim() > 1 else 0.0), name
    vectors = {name.split(".", 3)[-1] for name in decay if parameters[name].dim() == 1}
    assert vectors >= {"mlp.router.query.bias", "mlp.router.key_norm", "mlp.router.sink"}
    assert decay["decoder.layers.1.mlp.router.keys"] == 0.1


def test_increasing_weight_decay_leaves_the_values_alone():
    setup = make_setup(
        memory={"value_weight_decay": 0.03},
        start_weight_decay=0.0,
        end_weight_decay=0.8,
        weight_decay_incr_style="linear",
    )
    setup.scheduler.step(4 * setup.config.training.global_batch_size)  # of 8 iterations
    decay = {name: group["weight_decay"] for name, group in groups_by_name(setup).items()}
    assert decay["memory.shared.values.weight"] == 0.03
    assert decay["decoder.layers.1.mlp.router.keys"] == pytest.approx(0.4)
    assert decay["decoder.final_layernorm.weight"] == 0.0


def test_values_do_not_decay_by_default():
    setup = make_setup(weight_decay=0.1)
    assert groups_by_name(setup)["memory.shared.values.weight"]["weight_decay"] == 0.0


def test_without_memory_it_is_megatrons_optimizer():
    setup = make_setup(None)
    assert not isinstance(setup.optimizer, MemoryOptimizer)
    dense_norm, value_norm = fill_gradients(setup)
    assert value_norm == 0
    assert setup.optimizer.step()[:2] == (True, pytest.approx(dense_norm, rel=1e-5))
