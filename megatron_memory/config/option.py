"""What a field of a configuration dataclass may say about itself, beyond its type and docstring."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any

_METADATA_KEY = "option"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """Constraints and extra spellings of one configuration field."""

    at_least: float | None = None
    """Smallest value allowed."""
    at_most: float | None = None
    """Largest value allowed."""
    above: float | None = None
    """The value must be larger than this."""
    below: float | None = None
    """The value must be smaller than this."""
    derived_from: str | None = None
    """For a field that is computed when it is not given: from what, for `--help`."""
    not_here: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Choices known from Megatron-LM or planned, with the reason for refusing each."""
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Flags without a value that set this field, as Megatron-LM has them: name to value."""
    synonyms: tuple[str, ...] = ()
    """Other names of the flag."""
    may_differ: bool = False
    """Whether ranks of a run may have different values."""


_PLAIN = Option()


def option(default: Any = dataclasses.MISSING, **constraints: Any) -> Any:
    """A dataclass field with constraints (the arguments of `Option`).

    Without `default` the field is required. Returns `Any`, as `dataclasses.field` does for type
    checkers, so that a derived field is annotated with the type it has once it is computed.
    """
    metadata = {_METADATA_KEY: Option(**constraints)}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def derived(source: str, **constraints: Any) -> Any:
    """A field that is computed from others, as `source` says, when it is not given."""
    return option(None, derived_from=source, **constraints)


def fill_derived(component: Any, **values: Any) -> None:
    """Give each named field of a frozen dataclass its value where it is None."""
    for name, value in values.items():
        if getattr(component, name) is None:
            object.__setattr__(component, name, value)


def option_of(field: dataclasses.Field[Any]) -> Option:
    """The constraints of a dataclass field; empty ones where it declares none."""
    return field.metadata.get(_METADATA_KEY, _PLAIN)


@cache
def field_docstrings(component: type) -> Mapping[str, str]:
    """The docstring under each field of a dataclass, on one line: name to text."""
    source = textwrap.dedent(inspect.getsource(component))
    class_node = ast.parse(source).body[0]
    assert isinstance(class_node, ast.ClassDef), f"{component.__name__} is not a class"
    docstrings = {}
    for statement, following in zip(class_node.body, class_node.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docstrings[statement.target.id] = " ".join(str(following.value.value).split())
    return docstrings
