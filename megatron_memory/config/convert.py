"""From what a user wrote, on a command line or in YAML, to the value of a field."""

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from megatron_memory.config.option import Option
from megatron_memory.reading.pickles import shown

Kind = Literal["bool", "int", "float", "str", "choice"]

_EXPECTED = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
}
# torch and files keep no larger ones.
_MOST_BITS = 63
_NONE_WORDS = ("none", "null")


class WrongValue(Exception):
    """A value of the wrong type; its text says what is expected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueType:
    """What values a field takes, read off its annotation."""

    kind: Kind
    """Type of the value, or of each element."""
    many: bool = False
    """Whether the value is a list."""
    optional: bool = False
    """Whether None is a value."""
    choices: tuple[str, ...] = ()
    """The allowed texts of kind "choice"."""

    @property
    def expected(self) -> str:
        """The type in words."""
        one = f"one of {', '.join(self.choices)}" if self.choices else _EXPECTED[self.kind]
        return f"a list, each {one}" if self.many else one

    @property
    def metavar(self) -> str:
        """The value's placeholder in `--help`."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        return {"int": "N", "float": "X", "str": "TEXT", "bool": ""}[self.kind]


def value_type_of(annotation: Any) -> ValueType:
    """Read an annotation such as `int`, `float | None`, `Literal["a", "b"]`, `tuple[str, ...]`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return dataclasses.replace(value_type_of(inner), optional=True)
    if origin is tuple:
        return dataclasses.replace(value_type_of(arguments[0]), many=True)
    if origin is Literal:
        return ValueType(kind="choice", choices=arguments)
    kinds: dict[Any, Kind] = {bool: "bool", int: "int", float: "float", str: "str"}
    return ValueType(kind=kinds[annotation])


def convert(value_type: ValueType, accepts_none: bool, raw: Any) -> Any:
    """The value that `raw` (text, or what YAML made of it) stands for.

    Raises `WrongValue`, whose text says what is expected.
    """
    if accepts_none and (raw is None or _says_none(value_type, raw)):
        return None
    if not value_type.many:
        return _convert_one(value_type, raw)
    elements = raw if isinstance(raw, list | tuple) else [raw]
    try:
        return tuple(_convert_one(value_type, element) for element in elements)
    except WrongValue:
        raise WrongValue(value_type.expected) from None


def _says_none(value_type: ValueType, raw: Any) -> bool:
    return isinstance(raw, str) and raw.lower() in _NONE_WORDS and raw not in value_type.choices


def _convert_one(value_type: ValueType, raw: Any) -> Any:
    kind = value_type.kind
    if kind == "bool" and isinstance(raw, bool):
        return raw
    if kind == "choice" and isinstance(raw, str):
        # Whether it is one of the choices is for `problem_with`, which knows the refused ones.
        return raw
    if kind == "str":
        return _to_text(raw)
    if kind == "int" and isinstance(raw, int | str) and not isinstance(raw, bool):
        return _to_number(int, raw, value_type)
    if kind == "float" and isinstance(raw, int | float | str) and not isinstance(raw, bool):
        return _to_number(float, raw, value_type)
    raise WrongValue(value_type.expected)


def _to_number(number_type: type, raw: Any, value_type: ValueType) -> Any:
    try:
        return number_type(raw)
    except (ValueError, OverflowError):
        raise WrongValue(value_type.expected) from None


def _to_text(raw: Any) -> str:
    if isinstance(raw, str):
        return raw
    if _is_number(raw):
        return str(raw)
    # YAML's natural way to write "4,12,20" is a list.
    if isinstance(raw, list) and raw and all(map(_is_number, raw)):
        return ",".join(map(str, raw))
    raise WrongValue(_EXPECTED["str"])


def _is_number(raw: Any) -> bool:
    return isinstance(raw, int | float) and not isinstance(raw, bool)


def problem_with(name: str, value: Any, value_type: ValueType, option: Option) -> str | None:
    """What is wrong with a field's value by itself: a complete message, or None.

    `name` is how the user knows the field.
    """
    if value is None:
        return None
    if value_type.choices:
        return _problem_with_choice(name, value, value_type, option)
    if value_type.kind == "float" and not math.isfinite(value):
        return f"{name} is {value}: it must be a finite number."
    if value_type.kind == "int" and not value_type.many and value.bit_length() > _MOST_BITS:
        return f"{name} is {shown(value)}: it must be below 2^63."
    constraints = _violated(value, option)
    return f"{name} is {value}: it must be {constraints}." if constraints else None


def _problem_with_choice(
    name: str, value: Any, value_type: ValueType, option: Option
) -> str | None:
    values: Sequence[Any] = value if value_type.many else [value]
    for one in values:
        if one in option.not_here:
            return f"{name} {one} is not supported here: {option.not_here[one]}."
        if one not in value_type.choices:
            return f"{name} is {one!r}: it must be one of {', '.join(value_type.choices)}."
    return None


def _violated(value: Any, option: Option) -> str:
    # All bounds in one phrase, so that the fix of one does not run into the next.
    bounds = {
        "at least": (option.at_least, lambda bound: value >= bound),
        "above": (option.above, lambda bound: value > bound),
        "at most": (option.at_most, lambda bound: value <= bound),
        "below": (option.below, lambda bound: value < bound),
    }
    declared = {words: pair for words, pair in bounds.items() if pair[0] is not None}
    if all(holds(bound) for bound, holds in declared.values()):
        return ""
    return " and ".join(f"{words} {bound}" for words, (bound, _) in declared.items())
