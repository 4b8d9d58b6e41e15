"""bf16 on the CPU: a gradient that is a sum over many tokens is right to bf16's own rounding."""

import pytest
import torch

from megatron_memory.config import Config, PrecisionConfig
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.cpu_sums import embedding, layer_norm
from megatron_memory.runtime.distributed import initialize_distributed
from tests.distributed import run_ranks
from tests.full_tensors import assemble, local_weights
from tests.tiny import SEQUENCE, VOCAB, tiny_config, tiny_model

ROUNDING = 2**-8
"""Of bf16, at most half of a number's last bit: 2^-9; and as much in each part of the reference."""

BIASES = {
    "position_embedding_type": "learned_absolute",
    "max_position_embeddings": SEQUENCE,
    "normalization": "LayerNorm",
    "swiglu": False,
    "disable_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
EVERY_OPTION = {"gated": True, "qk_norm": True, "softmax_sink": True}
UNTIED = {"untie_embeddings_and_output_weights": True}
TP2 = {"tensor_model_parallel_size": 2}


def _config(variant: str, parallel: dict | None = None, **options) -> Config:
    return tiny_config(variant, parallel, precision=PrecisionConfig(bf16=True), **options)


def _errors(config: Config) -> dict[str, float]:
    """Of a microbatch's gradient against the sum of its parts', in fp64, relative to the largest
    entry."""
    initialize_distributed(config, select_backend("cpu"))
    model = tiny_model(config).bfloat16()
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCAB, (128, SEQUENCE + 1), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.6] = 3

    def gradients(part: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        positions = torch.arange(SEQUENCE).expand(len(part), -1)
        inputs, labels = part[:, :-1].contiguous(), part[:, 1:].contiguous()
        model(inputs, positions, None, labels=labels).sum().backward()
        return {name: p.grad.double() for name, p in model.named_parameters()}

    whole = gradients(tokens)
    parts = [gradients(part) for part in tokens.split(16)]
    errors = {}
    for name, gradient in whole.items():
        total = sum(part[name] for part in parts)
        errors[name] = ((gradient - total).abs().max() / total.abs().max()).item()
    return errors


def all_errors(configs: list[Config]) -> list[dict[str, float]]:
    results = []
    for config in configs:
        results.append(_errors(config))
        _leave_groups()
    return results


def _leave_groups() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def test_gradients_of_a_microbatch_are_the_sums_of_its_parts():
    """Of every parameter: embeddings of words and positions, norms, biases, keys, tables."""
    configs = [
        _config("memory+", model=BIASES, memory=EVERY_OPTION),
        _config("peer"),
    ]
    (results,) = run_ranks(all_errors, 1, configs)
    for errors in results:
        assert "embedding.word_embeddings.weight" in errors
        wrong = {name: error for name, error in errors.items() if error > 2 * ROUNDING}
        assert not wrong


def _tokens() -> torch.Tensor:
    """1000 times token 3, 512 times one of the other half of the vocabulary, 24 times token 7."""
    counts = {3: 1000, VOCAB // 2 + 5: 512, 7: 24}
    tokens = torch.cat([torch.full((number,), token) for token, number in counts.items()])
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(2))]


def counted(configs: list[Config]) -> list[dict]:
    """For each, this rank's part of the word embedding's gradient of the sum of what it gives, and
    the one of the positions."""
    results = []
    for config in configs:
        initialize_distributed(config, select_backend("cpu"))
        model = tiny_model(config).bfloat16()
        tokens = _tokens().view(-1, SEQUENCE)
        positions = torch.arange(SEQUENCE).expand(len(tokens), -1)
        model.embedding(tokens, positions).sum().backward()
        words = model.embedding.word_embeddings.weight
        words.data = words.grad
        pieces = local_weights(model)["embedding.word_embeddings.weight"]
        results.append({"embedding.word_embeddings.weight": pieces})
        _leave_groups()
    return results


@pytest.mark.distributed
def test_an_embedding_counts_a_thousand_tokens():
    """Tied and not, cut over the vocabulary, and under sequence parallelism."""
    plain = _config("pkm", TP2)
    configs = [
        plain,
        _config("pkm", TP2, model=UNTIED),
        _config("pkm", TP2 | {"sequence_parallel": True}),
        _config("pkm", TP2 | {"sequence_parallel": True}, model=BIASES),
    ]
    wanted = torch.bincount(_tokens(), minlength=VOCAB)[:, None].expand(-1, 32).float()
    ranks = run_ranks(counted, 2, configs)
    for seen in zip(*ranks, strict=True):
        whole = assemble(list(seen))["embedding.word_embeddings.weight"]
        assert torch.equal(whole.float(), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_functions_equal_torchs_own_in_fp64(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 3, (2, 1500), generator=generator)
    table, x = torch.rand(5, 8, generator=generator), torch.randn(3000, 8, generator=generator)
    weight, bias, upstream = (torch.rand(n, generator=generator) for n in (8, 8, (3000, 8)))

    def gradients(dtype: torch.dtype, embed, norm) -> list[torch.Tensor]:
        leaves = [t.clone().to(dtype).requires_grad_() for t in (table, x, weight, bias)]
        rows = embed(ids, leaves[0]).flatten(0, 1)
        normed = norm(leaves[1], (8,), leaves[2], leaves[3], 1e-5)
        assert rows.dtype == normed.dtype == dtype
        ((rows + normed) * upstream.to(dtype)).sum().backward()
        return [leaf.grad.double() for leaf in leaves]

    functional = torch.nn.functional
    ours = gradients(dtype, embedding, layer_norm)
    theirs = gradients(torch.float64, functional.embedding, functional.layer_norm)
    tolerance = 4 * torch.finfo(dtype).eps + 1e-6
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= tolerance * other.abs().max()
    assert ours[0][3:].eq(0).all()
