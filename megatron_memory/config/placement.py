"""Which layers are memory layers."""

from megatron_memory.exceptions import ConfigurationError

_FORMS = 'Give layer numbers counted from 0 ("4,12,20") or "centered:COUNT:STRIDE" ("centered:3:8")'


def resolve_memory_layers(spec: str, num_layers: int) -> tuple[int, ...]:
    """The layer numbers, counted from 0 and ascending, that `--memory-layers` names.

    `centered:3:8` are three layers with stride 8 around the middle: 4, 12, 20 of 24, the paper's
    choice.

    Raises:
        ConfigurationError: the text has neither form, or a layer is out of range or named twice.
    """
    if spec.startswith("centered:"):
        layers = _centered(spec, num_layers)
    else:
        layers = parse_layers(f"--memory-layers {spec}", spec)
    outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise ConfigurationError(
            f"--memory-layers {spec}: layer {outside[0]} is out of range, "
            f"--num-layers {num_layers} has layers 0 to {num_layers - 1}. {_FORMS}"
        )
    if len(set(layers)) < len(layers):
        raise ConfigurationError(f"--memory-layers {spec}: a layer is named twice. {_FORMS}")
    return tuple(sorted(layers))


def parse_layers(flag: str, text: str) -> list[int]:
    """Layer numbers from "4,12"; `flag` is what an error names.

    Raises:
        ConfigurationError: it is no list of numbers.
    """
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"{flag}: not a list of numbers. {_FORMS}") from None


def _is_positive(text: str) -> bool:
    return text.isdecimal() and len(text) < 10 and int(text) > 0


def _centered(spec: str, num_layers: int) -> list[int]:
    parts = spec.split(":")[1:]
    if len(parts) != 2 or not all(map(_is_positive, parts)):
        raise ConfigurationError(
            f"--memory-layers {spec}: COUNT and STRIDE must be positive numbers. {_FORMS}"
        )
    count, stride = (int(part) for part in parts)
    if count > num_layers:
        raise ConfigurationError(
            f"--memory-layers {spec}: {count} layers, and --num-layers {num_layers} has no more. "
            f"{_FORMS}"
        )
    first = (num_layers - (count - 1) * stride) // 2
    return [first + stride * i for i in range(count)]
