"""Text and YAML values to field values."""

from typing import Literal

import pytest

from megatron_memory.config.convert import (
    ValueType,
    WrongValue,
    convert,
    problem_with,
    value_type_of,
)
from megatron_memory.config.option import Option


@pytest.mark.parametrize(
    ("annotation", "value_type"),
    [
        (bool, ValueType(kind="bool")),
        (int | None, ValueType(kind="int", optional=True)),
        (tuple[str, ...], ValueType(kind="str", many=True)),
        (Literal["a", "b"], ValueType(kind="choice", choices=("a", "b"))),
        (
            tuple[Literal["a"], ...] | None,
            ValueType(kind="choice", choices=("a",), many=True, optional=True),
        ),
    ],
)
def test_annotations(annotation, value_type):
    assert value_type_of(annotation) == value_type


@pytest.mark.parametrize(
    ("annotation", "raw", "value"),
    [
        (int, "12", 12),
        (int, 12, 12),
        (int, "-1", -1),
        (float, "1e-4", 1e-4),
        (float, 1, 1.0),
        (bool, True, True),
        (str, "a b", "a b"),
        (str, 4, "4"),
        (str, [4, 12, 20], "4,12,20"),
        (str | None, "none", None),
        (str | None, None, None),
        (int | None, "NONE", None),
        (Literal["rope", "none"], "none", "none"),
        (Literal["rope", "none"] | None, "none", "none"),
        (tuple[str, ...], [0.3, "a", 0.7, "b"], ("0.3", "a", "0.7", "b")),
        (tuple[str, ...], "a", ("a",)),
        (tuple[str, ...], [], ()),
    ],
)
def test_values(annotation, raw, value):
    value_type = value_type_of(annotation)
    converted = convert(value_type, value_type.optional, raw)
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("annotation", "raw", "expected"),
    [
        (int, "1.5", "a whole number"),
        (int, 1.5, "a whole number"),
        (int, True, "a whole number"),
        (int, None, "a whole number"),
        (int, "none", "a whole number"),
        (int, [1], "a whole number"),
        (float, "fast", "a number"),
        (float, False, "a number"),
        (bool, "yes", "true or false"),
        (bool, 1, "true or false"),
        (str, ["a", "b"], "text"),
        (str, True, "text"),
        (str, None, "text"),
        (tuple[str, ...], [["a"]], "a list, each text"),
        (Literal["a", "b"], 3, "one of a, b"),
    ],
)
def test_wrong_types_say_what_is_expected(annotation, raw, expected):
    value_type = value_type_of(annotation)
    with pytest.raises(WrongValue, match=f"^{expected}$"):
        convert(value_type, value_type.optional, raw)


@pytest.mark.parametrize(
    ("bounds", "outside", "message"),
    [
        (Option(at_least=1), 0, "--x is 0: it must be at least 1."),
        (Option(at_least=0, below=1), 1.0, "--x is 1.0: it must be at least 0 and below 1."),
        (Option(above=0), 0.0, "--x is 0.0: it must be above 0."),
        (Option(at_most=9), 10, "--x is 10: it must be at most 9."),
        (Option(), float("nan"), "--x is nan: it must be a finite number."),
        (Option(), float("inf"), "--x is inf: it must be a finite number."),
    ],
)
def test_bounds(bounds, outside, message):
    assert problem_with("--x", outside, value_type_of(type(outside)), bounds) == message


def test_bounds_include_their_ends_as_they_say():
    number = ValueType(kind="int")
    assert problem_with("--x", 1, number, Option(at_least=1, at_most=1)) is None
    assert problem_with("--x", 1, number, Option(above=0, below=2)) is None
    assert problem_with("--x", None, number, Option(at_least=1)) is None


def test_choices():
    choice = ValueType(kind="choice", choices=("a", "b"))
    option = Option(not_here={"c": "it is not built"})
    assert problem_with("--x", "a", choice, option) is None
    assert problem_with("--x", "c", choice, option) == (
        "--x c is not supported here: it is not built."
    )
    assert problem_with("--x", "d", choice, option) == "--x is 'd': it must be one of a, b."
