"""Flags and `--help`, generated from the fields of the configuration dataclasses.

A flag, a key of the configuration file and a field share one name: `hidden_size` is
`--hidden-size`; fields of the memory component carry a prefix, `memory_top_k`, `--memory-top-k`.
"""

import argparse
import dataclasses
import textwrap
import typing
from collections.abc import Mapping
from functools import cache, cached_property
from typing import Any

from megatron_memory.config.convert import ValueType, value_type_of
from megatron_memory.config.option import Option, field_docstrings, option_of
from megatron_memory.config.schema import Config

PREFIXES = {"memory": "memory_"}
"""Of a component's flags."""

_USAGE = "torchrun --nproc-per-node N -m megatron_memory.train [--config FILE.yaml] [--flags]"
_EPILOG = """\
The configuration file is YAML with one key for each flag (dashes or underscores). The command line
wins over the file, and the file over the defaults. Every switch has an opposite, which undoes what
the file says: --no-bf16 for --bf16, --save-optim for --no-save-optim. The value `none` takes back
a setting that can be absent, as in --memory-layers none.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """One field of one component, as users write it."""

    key: str
    """Key in the configuration file: the flag's name with underscores."""
    component: str
    """Field of `Config` that holds the component."""
    field: dataclasses.Field[Any]
    """The component's field."""
    value_type: ValueType
    """What values it takes."""
    text: str
    """The field's docstring."""

    @cached_property
    def option(self) -> Option:
        """Constraints of the field."""
        return option_of(self.field)

    @property
    def spelled(self) -> str:
        """The flag as it stands on a command line."""
        return flag_name(self.key)

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        missing = dataclasses.MISSING
        return self.field.default is missing and self.field.default_factory is missing

    @property
    def accepts_none(self) -> bool:
        """Whether the setting can be absent, or be computed when it is."""
        return self.value_type.optional or self.option.derived_from is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spelling:
    """One name of a flag."""

    flag: Flag
    is_switch: bool = False
    """Whether the name takes no value but stands for `value`."""
    value: Any = None
    """What a switch sets."""


def flag_name(key: str) -> str:
    """`hidden_size` -> `--hidden-size`."""
    return "--" + key.replace("_", "-")


def key_of(name: str) -> str:
    """A flag or key in any spelling -> the key with underscores."""
    return name.removeprefix("--").replace("-", "_")


@cache
def component_types() -> Mapping[str, type]:
    """Component name -> dataclass, in the order of `Config`."""
    hints = typing.get_type_hints(Config)
    return {field.name: hints[field.name] for field in dataclasses.fields(Config)}


@cache
def all_flags() -> Mapping[str, Flag]:
    """Every field of every component: key -> flag."""
    flags: dict[str, Flag] = {}
    for component, component_type in component_types().items():
        hints = typing.get_type_hints(component_type)
        docstrings = field_docstrings(component_type)
        for field in dataclasses.fields(component_type):
            key = PREFIXES.get(component, "") + field.name
            assert key not in flags, f"two fields are called {key}"
            flags[key] = Flag(
                key=key,
                component=component,
                field=field,
                value_type=value_type_of(hints[field.name]),
                text=docstrings[field.name],
            )
    return flags


@cache
def all_spellings() -> Mapping[str, Spelling]:
    """Every name that a flag or key may have, with underscores -> what it means."""
    spellings: dict[str, Spelling] = {}

    def add(name: str, spelling: Spelling) -> None:
        assert name not in spellings, f"two flags are called {name}"
        spellings[name] = spelling

    for flag in all_flags().values():
        if flag.value_type.kind == "bool":
            add(flag.key, Spelling(flag=flag, is_switch=True, value=True))
            add(opposite(flag.key), Spelling(flag=flag, is_switch=True, value=False))
        else:
            add(flag.key, Spelling(flag=flag))
        for name in flag.option.synonyms:
            add(name, Spelling(flag=flag))
        for name, value in flag.option.switches.items():
            add(name, Spelling(flag=flag, is_switch=True, value=value))
    return spellings


def opposite(key: str) -> str:
    """The name that sets a switch to false: `bf16` -> `no_bf16`, `no_save_rng` -> `save_rng`."""
    return key.removeprefix("no_") if key.startswith("no_") else "no_" + key


def help_text() -> str:
    """The text of `--help`."""
    return _help_parser().format_help()


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps flags whole, so that they can be searched for and copied."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def _help_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage=_USAGE,
        description="Train a language model with memory layers.",
        epilog=_EPILOG,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Configuration file.")
    titles = field_docstrings(Config)
    for component in component_types():
        group = parser.add_argument_group(titles[component])
        for flag in all_flags().values():
            if flag.component == component:
                _add_to_help(group, flag)
    return parser


def _add_to_help(group: argparse._ArgumentGroup, flag: Flag) -> None:
    # argparse interpolates help with %, so a literal one has to be doubled.
    text = _describe(flag).replace("%", "%%")
    if flag.value_type.kind == "bool":
        group.add_argument(flag.spelled, action="store_true", help=text)
    else:
        names = [flag.spelled, *map(flag_name, flag.option.synonyms)]
        nargs = "*" if flag.value_type.many else None
        group.add_argument(*names, nargs=nargs, metavar=flag.value_type.metavar, help=text)
    for name, value in flag.option.switches.items():
        group.add_argument(
            flag_name(name), action="store_true", help=_describe_switch(flag, name, value)
        )


def _describe(flag: Flag) -> str:
    if flag.field.default is None and "Without this flag" in flag.text:
        return flag.text
    return f"{flag.text} ({_describe_default(flag)})"


def _describe_default(flag: Flag) -> str:
    if flag.required:
        return "required"
    if flag.option.derived_from is not None:
        return f"default: {flag.option.derived_from}"
    default = flag.field.default
    if flag.value_type.kind == "bool":
        switch_off = f", {flag_name(opposite(flag.key))} turns it off" if default else ""
        return f"default: {'on' if default else 'off'}{switch_off}"
    return f"default: {default if default not in (None, ()) else 'none'}"


def _describe_switch(flag: Flag, name: str, value: Any) -> str:
    if flag.value_type.kind == "bool":
        meaning = flag.spelled if value else flag_name(opposite(flag.key))
    else:
        meaning = f"{flag.spelled} {value}"
    return f"Megatron-LM's name for {meaning}."
