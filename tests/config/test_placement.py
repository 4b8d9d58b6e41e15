"""Which layers `--memory-layers` names."""

import pytest

from megatron_memory.config.placement import resolve_memory_layers
from megatron_memory.exceptions import ConfigurationError


@pytest.mark.parametrize(
    ("spec", "num_layers", "layers"),
    [
        ("centered:3:8", 24, (4, 12, 20)),  # the paper's
        ("centered:3:4", 12, (2, 6, 10)),  # its 134m model
        ("centered:3:8", 32, (8, 16, 24)),
        ("centered:1:1", 24, (12,)),  # the middle layer of vanilla memory
        ("centered:1:8", 5, (2,)),
        ("centered:2:1", 2, (0, 1)),
        ("4,12,20", 24, (4, 12, 20)),
        ("20, 4,12", 24, (4, 12, 20)),
        ("0", 1, (0,)),
        ("23", 24, (23,)),
    ],
)
def test_layers(spec: str, num_layers: int, layers: tuple[int, ...]):
    assert resolve_memory_layers(spec, num_layers) == layers


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("24", "layer 24 is out of range, --num-layers 24 has layers 0 to 23"),
        ("-1", "layer -1 is out of range"),
        ("centered:3:12", "layer 24 is out of range"),
        ("centered:4:8", "out of range"),
        ("centered:25:1", "25 layers, and --num-layers 24 has no more"),
        ("centered:200000000:1", "200000000 layers, and --num-layers 24 has no more"),
        ("centered:1000000000:1", "COUNT and STRIDE must be positive"),
        ("centered:1:" + "9" * 5000, "COUNT and STRIDE must be positive"),
        ("4,4", "named twice"),
        ("", "not a list of numbers"),
        ("4,", "not a list of numbers"),
        ("middle", "not a list of numbers"),
        ("4.5", "not a list of numbers"),
        ("centered:3", "COUNT and STRIDE must be positive"),
        ("centered:3:8:1", "COUNT and STRIDE must be positive"),
        ("centered:0:8", "COUNT and STRIDE must be positive"),
        ("centered:3:0", "COUNT and STRIDE must be positive"),
        ("centered:-3:8", "COUNT and STRIDE must be positive"),
        ("centered:a:8", "COUNT and STRIDE must be positive"),
        ("centered:²:8", "COUNT and STRIDE must be positive"),
    ],
)
def test_wrong_text_names_the_flag_and_both_forms(spec: str, message: str):
    with pytest.raises(ConfigurationError) as raised:
        resolve_memory_layers(spec, 24)
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"--memory-layers {spec}: ")
    assert "centered:COUNT:STRIDE" in str(raised.value)
