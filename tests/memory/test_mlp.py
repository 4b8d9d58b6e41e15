"""A memory beside an MLP, on one rank (others: tests/training/test_parity_one_rank.py)."""

import pytest
import torch
from megatron.core.transformer.mlp import MLP

from tests.tiny import SEQUENCE, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.mark.parametrize("variant", ["memory+", "pkm"])
@pytest.mark.parametrize("no_bias", [False, True])
def test_output_is_the_sum_of_both(variant: str, no_bias: bool):
    """memory+ has a bias of its own, plain pkm has none."""
    config = tiny_config(
        variant, memory={"beside_mlp": True}, model={"disable_bias_linear": no_bias}
    )
    model = tiny_model(config)
    mlp = model.decoder.layers[1].mlp
    assert [layer.layer_number for layer in model.memory_layers()] == [2, 4]
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    x = torch.randn(SEQUENCE, 2, 32)
    parts = [MLP.forward(mlp, x), mlp.memory(x)]
    expected = sum(out if bias is None else out + bias for out, bias in parts)
    output, bias = mlp(x)
    assert (bias is None) == (variant == "pkm" and no_bias)
    torch.testing.assert_close(output if bias is None else output + bias, expected)
