"""Single memory layers against the public reference's numbers (tests/golden/README.md).

fp32 against fp32 in another order of summation: sums of some 10^2 terms of size 1 differ by a few
times 10^-6, and gradients pass through two or three such sums. 1e-5, relative to the largest entry,
is ten times below what one wrong index or a missing term would cause.
"""

import pytest
import torch
from megatron.core import parallel_state

from megatron_memory.model.gpt import build_model
from megatron_memory.runtime import select_backend
from megatron_memory.runtime.distributed import initialize_distributed
from tests.distributed import run_ranks
from tests.golden_module import (
    case_config,
    golden_cases,
    golden_gradients,
    load_case,
    load_layer_,
)

TOLERANCE = 1e-5
LAYOUTS = {"tp1": (1, False), "tp2": (2, False), "tp2-sp": (2, True)}


def _assert_close(name: str, ours: torch.Tensor, golden: torch.Tensor) -> None:
    error = (ours - golden).abs().max() / golden.abs().max()
    assert error < TOLERANCE, f"{name}: off by {error:.2e} of its largest entry"


def _own_positions(x: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    if not sequence_parallel:
        return x
    group = parallel_state.get_tensor_model_parallel_group()
    return x.chunk(group.size())[group.rank()]


def _sum_partial_gradients(layers, group) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            if getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(parameter.grad, group=group)


def _check_case(name: str, tensor_parallel_size: int, sequence_parallel: bool) -> None:
    options, tensors = load_case(name)
    if sequence_parallel:
        options, tensors = _first_positions(options, tensors)
    config = case_config(options, tensor_parallel_size, sequence_parallel)
    backend = select_backend("cpu")
    initialize_distributed(config, backend)
    (model,) = build_model(config, backend, padded_vocab_size=16)
    layers = model.memory_layers()
    for position, layer in enumerate(layers):
        load_layer_(layer, tensors, position)

    x = _own_positions(tensors["input"].transpose(0, 1), sequence_parallel)
    x = x.contiguous().requires_grad_()
    golden_final = _own_positions(tensors["final"].transpose(0, 1), sequence_parallel)
    hidden = x
    for position, layer in enumerate(layers):
        if not sequence_parallel:
            _check_routing(layer, hidden, tensors, position)
        output, bias = layer(hidden)
        output = output if bias is None else output + bias
        golden = _own_positions(tensors[f"output.{position}"].transpose(0, 1), sequence_parallel)
        _assert_close(f"output {position}", output, golden)
        hidden = output if len(layers) == 1 else hidden + output
    _assert_close("final", hidden, golden_final)
    if sequence_parallel and "grad_output" not in tensors:
        return
    grad_output = _own_positions(tensors["grad_output"].transpose(0, 1), sequence_parallel)
    hidden.backward(grad_output.contiguous())
    if sequence_parallel:
        _sum_partial_gradients(layers, layers[0].group.tp)
    golden = _own_positions(tensors["grad.input"].transpose(0, 1), sequence_parallel)
    _assert_close("grad of the input", x.grad, golden)
    for position, layer in enumerate(layers):
        pairs = golden_gradients(layer, tensors, position)
        assert len(pairs) >= 3
        for number, (parameter, golden) in enumerate(pairs):
            _assert_close(f"grad {position}.{number}", parameter.grad, golden.view_as(parameter))


def _first_positions(options: dict, tensors: dict) -> tuple[dict, dict]:
    """The sequence must split over the ranks; drop the gradients where that changes their sums."""
    length = options["seq"] - options["seq"] % 2
    if length == options["seq"]:
        return options, tensors
    kept = {k: v for k, v in tensors.items() if not k.startswith("grad") and k != "grad_output"}
    for key, value in kept.items():
        if key in ("input", "final") or key.startswith("output."):
            kept[key] = value[:, :length]
    return options | {"seq": length}, kept


def _check_routing(layer, hidden, tensors, position: int) -> None:
    """Slots and scores, [tokens, heads, top-k]; the file's tokens are batch-major."""
    route = layer.router(hidden.transpose(0, 1))
    assert torch.equal(route.indices.long(), tensors[f"indices.{position}"])
    _assert_close(f"scores {position}", route.scores, tensors[f"scores.{position}"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", golden_cases())
def test_layer_equals_reference(name: str, layout: str):
    run_ranks(_check_case, LAYOUTS[layout][0], name, *LAYOUTS[layout])


def test_cases_are_there():
    assert len(golden_cases()) == 8
