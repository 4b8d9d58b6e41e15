"""From tokens to slots: qk-norm, random values, the softmax and its sink, query dropout."""

import pytest
import torch

from megatron_memory.config import ParallelConfig
from megatron_memory.memory.routing import MemoryRouter, Route
from megatron_memory.model.config import build_transformer_config
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed, seed_everything
from memory_kernels.product_key.reference import product_key_scores_reference
from tests.distributed import run_ranks
from tests.tiny import tiny_config

HEADS, TOP_K, SLOTS, TOKENS = 2, 4, 64, 40

pytestmark = pytest.mark.usefixtures("one_rank")


def make_router(*, parallel: dict | None = None, **memory) -> MemoryRouter:
    """The tiny model's router, in training mode; biases and gains are not their initial ones."""
    config = tiny_config("pkm", parallel, memory=memory)
    seed_everything(7)
    router = MemoryRouter(build_transformer_config(config, select_backend("cpu")))
    with torch.no_grad():
        router.query.bias.normal_()
        for name in ("query_norm", "key_norm", "sink"):
            if hasattr(router, name):
                getattr(router, name).uniform_(0.5, 1.5)
    return router


def make_tokens() -> torch.Tensor:
    """[T, hidden]."""
    return torch.randn(TOKENS, 32, generator=torch.Generator().manual_seed(3))


def all_scores(router: MemoryRouter, x: torch.Tensor) -> torch.Tensor:
    """[T, H, S] without qk-norm and dropout."""
    query = router.query(x).view(TOKENS, HEADS, -1)
    return product_key_scores_reference(query, router.keys)


def test_top_slots_with_their_softmax():
    router, x = make_router(), make_tokens()
    route = router(x)
    wanted_scores, wanted = all_scores(router, x).sort(dim=-1, descending=True)
    assert torch.equal(route.indices.long(), wanted[..., :TOP_K])
    torch.testing.assert_close(route.scores, wanted_scores[..., :TOP_K])
    torch.testing.assert_close(route.weights, wanted_scores[..., :TOP_K].softmax(dim=-1))


def test_leading_dimensions_are_flattened():
    router, x = make_router(), make_tokens()
    flat, shaped = router(x), router(x.view(10, 4, 32))
    assert torch.equal(flat.indices, shaped.indices)
    assert flat.indices.shape == (TOKENS, HEADS, TOP_K)


def test_qk_norm_normalises_each_half():
    router, x = make_router(qk_norm=True), make_tokens()
    query = router.query(x).view(TOKENS, HEADS, 2, -1)
    gains = [gain.view(2, -1) for gain in (router.query_norm, router.key_norm)]

    def normed(halves: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return halves / (halves.square().mean(dim=-1, keepdim=True) + 1e-8).sqrt() * gain

    scores = torch.einsum(
        "thpd,hpnd->pthn",
        normed(query, gains[0]),
        normed(router.keys, gains[1][:, None]),
    )
    scores = (scores[0][..., :, None] + scores[1][..., None, :]).flatten(-2)
    route = router(x)
    wanted_scores, wanted = scores.sort(dim=-1, descending=True)
    assert torch.equal(route.indices.long(), wanted[..., :TOP_K])
    torch.testing.assert_close(route.scores, wanted_scores[..., :TOP_K], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [True, False])
def test_only_qk_norm_makes_scores_invariant_to_scale(qk_norm: bool):
    router, x = make_router(qk_norm=qk_norm), make_tokens()
    before = router(x)
    router.query.weight *= 100
    router.query.bias *= 100
    router.keys *= 10
    after = router(x)
    if qk_norm:
        torch.testing.assert_close(after.scores, before.scores, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(after.scores, before.scores * 1000, rtol=1e-4, atol=1e-4)
    assert torch.equal(after.indices, before.indices)


def test_qk_norm_gains_are_trained():
    router = make_router(qk_norm=True)
    router(make_tokens()).weights.square().sum().backward()
    for gain in (router.query_norm, router.key_norm):
        assert gain.grad.abs().min() > 0


def test_random_values_are_read_in_training_at_their_own_scores():
    router, x = make_router(num_random_values=3), make_tokens()
    scores = all_scores(router, x)
    route = router(x)
    assert route.indices.shape == route.scores.shape == (TOKENS, HEADS, TOP_K + 3)
    assert torch.equal(route.indices[..., :TOP_K].long(), scores.topk(TOP_K).indices)
    torch.testing.assert_close(route.scores, scores.gather(-1, route.indices.long()))
    torch.testing.assert_close(route.weights, route.scores.softmax(dim=-1))
    assert route.indices.min() >= 0
    assert route.indices.max() < SLOTS


def test_random_values_are_uniform_over_all_slots():
    router, x = make_router(num_random_values=3), make_tokens()
    drawn = torch.cat([router(x).indices[..., TOP_K:].flatten() for _ in range(100)])
    counts = torch.bincount(drawn, minlength=SLOTS)
    # 24000 draws over 64 slots: 375 each, with a deviation of 19.
    assert counts.min() > 375 - 5 * 19
    assert counts.max() < 375 + 5 * 19


def test_random_values_get_gradients():
    router, x = make_router(num_random_values=3), make_tokens()
    router(x).scores[..., TOP_K:].sum().backward()
    assert router.keys.grad.any()
    assert router.query.weight.grad.any()


def test_random_values_are_not_read_in_evaluation():
    router, x = make_router(num_random_values=3).eval(), make_tokens()
    assert router(x).indices.shape == (TOKENS, HEADS, TOP_K)


@pytest.mark.parametrize("memory", [{"num_random_values": 3}, {"query_dropout": 0.5}], ids=str)
def test_draws_follow_the_seed(memory: dict):
    router, x = make_router(**memory), make_tokens()
    routes = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        routes.append((router(x), router(x)))
    for first, second in zip(routes[0], routes[1], strict=True):
        assert torch.equal(first.indices, second.indices)
        assert torch.equal(first.weights, second.weights)
    assert not torch.equal(routes[0][0].indices, routes[0][1].indices)
    assert not torch.equal(routes[0][0].indices, routes[2][0].indices)


def test_without_sink_the_weights_sum_to_one():
    weights = make_router()(make_tokens()).weights
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(TOKENS, HEADS))


def test_a_sink_takes_its_share():
    router, x = make_router(softmax_sink=True), make_tokens()
    route = router(x)
    exponentials = route.scores.exp()
    total = exponentials.sum(dim=-1, keepdim=True) + router.sink.exp()[None, :, None]
    torch.testing.assert_close(route.weights, exponentials / total)
    assert (route.weights.sum(dim=-1) < 1).all()


def test_a_sink_begins_at_zero_and_learns():
    config = tiny_config("pkm", memory={"softmax_sink": True})
    router = MemoryRouter(build_transformer_config(config, select_backend("cpu")))
    assert torch.equal(router.sink, torch.zeros(HEADS))
    route = router(make_tokens())
    (route.weights.sum(dim=-1) * torch.tensor([1.0, 2.0])).sum().backward()
    # d(1 - p)/ds = -p (1 - p), with the sink's probability p.
    p = 1 - route.weights.detach().sum(dim=-1)
    wanted = -(p * (1 - p)).sum(dim=0) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(router.sink.grad, wanted, rtol=1e-4, atol=1e-5)


def test_query_dropout_is_for_training_only():
    router, x = make_router(query_dropout=0.5), make_tokens()
    plain = make_router()(x)
    dropped = router(x)
    assert not torch.equal(dropped.indices, plain.indices)
    evaluated = router.eval()(x)
    assert torch.equal(evaluated.indices, plain.indices)
    assert torch.equal(evaluated.scores, plain.scores)


def _route_alike(memory: dict, sequence_parallel: bool) -> list[Route]:
    """Two routes of the same tokens, by the same weights, on this rank."""
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
    config = tiny_config("pkm", parallel, memory=memory)
    assert config.parallel == ParallelConfig(**parallel)
    initialize_distributed(config, select_backend("cpu"))
    router, x = make_router(parallel=parallel, **memory), make_tokens()
    return [router(x), router(x)]


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_ranks_draw_for_their_own_tokens_or_alike_for_all(sequence_parallel: bool):
    """Under sequence parallelism ranks route different tokens, which must not share their draws."""
    memory = {"num_random_values": 3, "query_dropout": 0.5}
    first, second = run_ranks(_route_alike, 2, memory, sequence_parallel)
    for ours, theirs in zip(first, second, strict=True):
        drawn_alike = torch.equal(ours.indices[..., TOP_K:], theirs.indices[..., TOP_K:])
        dropped_alike = torch.equal(ours.indices[..., :TOP_K], theirs.indices[..., :TOP_K])
        assert drawn_alike is not sequence_parallel
        assert dropped_alike is not sequence_parallel


def test_parameters_are_marked_for_sequence_parallelism():
    options = {"qk_norm": True, "softmax_sink": True}
    for parallel in ({}, {"sequence_parallel": True, "tensor_model_parallel_size": 2}):
        router = make_router(parallel=parallel, **options)
        marks = {name: p.sequence_parallel for name, p in router.named_parameters()}
        assert marks.keys() == {
            "query.weight",
            "query.bias",
            "keys",
            "query_norm",
            "key_norm",
            "sink",
        }
        assert set(marks.values()) == {bool(parallel)}
