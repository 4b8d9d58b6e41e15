"""Command lines of small programs: flags made from the fields of a few dataclasses."""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from megatron_memory.config.convert import (
    ValueType,
    WrongValue,
    convert,
    problem_with,
    value_type_of,
)
from megatron_memory.config.flags import PREFIXES, flag_name
from megatron_memory.config.option import field_docstrings, option_of
from megatron_memory.config.problems import raise_problems
from megatron_memory.exceptions import ConfigurationError

T = TypeVar("T")
_POSITIONAL = "positional"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Flag:
    component: str
    field: dataclasses.Field[Any]
    value_type: ValueType
    text: str

    @property
    def key(self) -> str:
        return PREFIXES.get(self.component, "") + self.field.name

    @property
    def names(self) -> list[str]:
        return [flag_name(key) for key in (self.key, *option_of(self.field).synonyms)]

    @property
    def is_switch_with_no(self) -> bool:
        """A bool that is not off by itself has a --no- form, too."""
        return self.value_type.kind == "bool" and self.field.default is not False


def parse_command(
    request: type[T],
    argv: Sequence[str],
    *,
    usage: str,
    epilog: str = "",
    positional: str | None = None,
) -> T:
    """Read a command line; `--help` prints and exits.

    Args:
        request: a dataclass whose docstring describes the program and whose fields are dataclasses
            of flags, each with the title of its group below it.
        argv: without the program's name.
        usage: how it is started.
        epilog: what `--help` ends with.
        positional: a field whose flag may be omitted before its value.

    Raises:
        ConfigurationError: an unknown flag, or a value that cannot be.
    """
    flags = list(_flags(request))
    parser = _parser(request, flags, usage, epilog)
    if positional is not None:
        parser.add_argument(_POSITIONAL, nargs="?", help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args([_with_dashes(word) for word in argv])
    raise_problems(_unknown(word, flags) for word in rest[:1])
    settings: dict[str, dict[str, Any]] = {flag.component: {} for flag in flags}
    problems = []
    for flag in flags:
        raw = getattr(given, flag.key)
        if flag.key == positional and getattr(given, _POSITIONAL) is not None:
            if raw is not None:
                problems.append(f"{flag.names[0]} is given twice, once without its name.")
            raw = getattr(given, _POSITIONAL)
        if raw is None:
            if flag.field.default is dataclasses.MISSING:
                problems.append(f"{flag.names[0]} is required: {flag.text}")
            continue
        try:
            value = convert(flag.value_type, flag.value_type.optional, raw)
        except WrongValue as wrong:
            problems.append(f"{flag.names[0]} is {raw!r}, but expects {wrong}.")
            continue
        settings[flag.component][flag.field.name] = value
        problem = problem_with(flag.names[0], value, flag.value_type, option_of(flag.field))
        problems += [] if problem is None else [problem]
    raise_problems(problems)
    types = typing.get_type_hints(request)
    return request(**{name: types[name](**values) for name, values in settings.items()})


def _flags(request: type) -> Iterator[_Flag]:
    for component, component_type in typing.get_type_hints(request).items():
        hints, texts = typing.get_type_hints(component_type), field_docstrings(component_type)
        for field in dataclasses.fields(component_type):
            yield _Flag(
                component=component,
                field=field,
                value_type=value_type_of(hints[field.name]),
                text=texts[field.name],
            )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(
            f"{message}. Write a value that begins with a dash after an equals sign, as in "
            "--flag=-5; see --help."
        )


def _parser(request: type, flags: list[_Flag], usage: str, epilog: str) -> _Parser:
    parser = _Parser(
        usage=usage,
        description=(request.__doc__ or "").strip(),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups = {
        component: parser.add_argument_group(title)
        for component, title in field_docstrings(request).items()
    }
    for flag in flags:
        options: dict[str, Any] = dict(dest=flag.key, default=None, help=_help(flag))
        if flag.value_type.kind == "bool":
            switch = argparse.BooleanOptionalAction if flag.is_switch_with_no else "store_true"
            options |= dict(action=switch)
        else:
            options |= dict(metavar=flag.value_type.metavar)
        if flag.value_type.many:
            options |= dict(nargs="+", action="extend")
        groups[flag.component].add_argument(*flag.names, **options)
    return parser


def _help(flag: _Flag) -> str:
    default = flag.field.default
    if default is dataclasses.MISSING:
        text = f"{flag.text} (required)"
    elif flag.value_type.kind == "bool" or default in (None, ()):
        text = flag.text
    else:
        text = f"{flag.text} (default: {default})"
    # argparse interpolates help with %, so a literal one has to be doubled.
    return text.replace("%", "%%")


def _with_dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _unknown(word: str, flags: list[_Flag]) -> str:
    if not word.startswith("-"):
        return f"{word!r} belongs to no flag: put a value that contains spaces in quotes."
    name = word.partition("=")[0]
    known = [known for flag in flags for known in flag.names]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    advice = f"Did you mean {near[0]}?" if near else "See --help for all of them."
    return f"{name} is not a flag of this program. {advice}"
