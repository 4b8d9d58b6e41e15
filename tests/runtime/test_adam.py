"""FusedAdam against torch's own Adam and AdamW."""

import copy

import pytest
import torch

from megatron_memory.runtime.adam import FusedAdam

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (257,), (1,)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def set_gradients(parameters, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", ["AdamW", "Adam"])
def test_equals_torchs_fused_kernel_to_the_bit(kind: str):
    ours, theirs = make_parameters(), make_parameters()
    optimizer = FusedAdam(ours, **SETTINGS, adam_w_mode=kind == "AdamW")
    reference = getattr(torch.optim, kind)(theirs, **SETTINGS, fused=True)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][moment], reference.state[b][moment])


def test_equals_the_formula():
    ours, theirs = make_parameters(), [p.detach().double() for p in make_parameters()]
    optimizer = FusedAdam(ours, **SETTINGS)
    first, second = ([torch.zeros_like(p) for p in theirs] for _ in range(2))
    for step in range(1, 6):
        set_gradients(ours, step)
        optimizer.step()
        for i, parameter in enumerate(theirs):
            gradient = ours[i].grad.double()
            first[i] = 0.9 * first[i] + 0.1 * gradient
            second[i] = 0.95 * second[i] + 0.05 * gradient**2
            mean = first[i] / (1 - 0.9**step)
            root = (second[i] / (1 - 0.95**step)).sqrt()
            parameter.mul_(1 - 1e-2 * 0.1).sub_(1e-2 * mean / (root + 1e-6))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_groups_keep_settings_and_steps_of_their_own():
    ours, theirs = make_parameters(), make_parameters()
    groups = [{"lr": 1e-2}, {"lr": 1e-3, "weight_decay": 0.0}, {"betas": (0.5, 0.5)}]
    make = lambda ps: [dict(params=[p], **g) for p, g in zip(ps, groups, strict=True)]  # noqa: E731
    optimizer = FusedAdam(make(ours), **SETTINGS)
    reference = torch.optim.AdamW(make(theirs), **SETTINGS, fused=True)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert [group["step"] for group in optimizer.param_groups] == [3, 3, 3]


def test_parameters_without_gradient_stay():
    parameters = make_parameters()
    optimizer = FusedAdam(parameters, **SETTINGS)
    set_gradients(parameters[:2], 0)
    before = parameters[2].detach().clone()
    optimizer.step()
    assert torch.equal(parameters[2], before)
    assert parameters[2] not in optimizer.state


def test_state_continues_where_it_was_saved():
    """The step count is in the group, where distributed checkpoints keep it, and in no state."""
    whole, first = make_parameters(), make_parameters()
    optimizer, saved = FusedAdam(whole, **SETTINGS), FusedAdam(first, **SETTINGS)
    for step in range(2):
        set_gradients(whole, step)
        set_gradients(first, step)
        optimizer.step()
        saved.step()
    state = copy.deepcopy(saved.state_dict())
    assert [group["step"] for group in state["param_groups"]] == [2]
    assert all(set(moments) == {"exp_avg", "exp_avg_sq"} for moments in state["state"].values())
    resumed = FusedAdam(first, **(SETTINGS | {"lr": 5.0}))
    resumed.load_state_dict(state)
    for step in range(2, 4):
        set_gradients(whole, step)
        set_gradients(first, step)
        optimizer.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, first, strict=True))
