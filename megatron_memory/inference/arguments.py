"""The command line of the generation: flags made from the fields of `options`."""

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_memory.config.convert import ValueType, WrongValue, convert, value_type_of
from megatron_memory.config.flags import flag_name
from megatron_memory.config.option import field_docstrings, option_of
from megatron_memory.config.problems import raise_problems
from megatron_memory.exceptions import ConfigurationError
from megatron_memory.inference.options import ModelSource, Prompts, Sampling

_USAGE = "python -m megatron_memory.generate --load DIR --prompt TEXT [--flags]"
_EPILOG = """\
With N processes: torchrun --nproc-per-node N -m megatron_memory.generate \
--tensor-model-parallel-size N ...
The model's shape, precision and tokenizer come from the checkpoint's config.yaml. A prompt that
begins with a dash follows an equals sign: --prompt=-5. Flags may be written with underscores, too.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A whole command line."""

    source: ModelSource
    """Model"""
    prompts: Prompts
    """Prompts"""
    sampling: Sampling
    """Choice of tokens"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Flag:
    component: str
    field: dataclasses.Field[Any]
    value_type: ValueType
    text: str

    @property
    def names(self) -> list[str]:
        return [flag_name(key) for key in (self.field.name, *option_of(self.field).synonyms)]


def parse_request(argv: Sequence[str]) -> Request:
    """Read a command line; `--help` prints and exits.

    Raises:
        ConfigurationError: an unknown flag, or a value that cannot be.
    """
    flags = list(_flags())
    given, rest = _parser(flags).parse_known_args([_with_dashes(word) for word in argv])
    raise_problems(_unknown(word, flags) for word in rest[:1])
    settings: dict[str, dict[str, Any]] = {flag.component: {} for flag in flags}
    problems = []
    for flag in flags:
        raw = getattr(given, flag.field.name)
        if raw is None:
            if flag.field.default is dataclasses.MISSING:
                problems.append(f"{flag.names[0]} is required: {flag.text}")
            continue
        try:
            value = convert(flag.value_type, flag.value_type.optional, raw)
            settings[flag.component][flag.field.name] = value
        except WrongValue as wrong:
            problems.append(f"{flag.names[0]} is {raw!r}, but expects {wrong}.")
    raise_problems(problems)
    types = typing.get_type_hints(Request)
    return Request(**{name: types[name](**values) for name, values in settings.items()})


def read_prompts(prompts: Prompts) -> list[str]:
    """All prompts, those of the command line first.

    Raises:
        ConfigurationError: there is none, one is empty, or the file cannot be read.
    """
    texts = list(prompts.prompt)
    if "" in texts:
        raise ConfigurationError('--prompt "" is empty: give at least one character to continue.')
    if prompts.prompts_file is not None:
        texts += _lines(prompts.prompts_file)
    if not texts:
        raise ConfigurationError("--prompt is missing: give a text to continue, or --prompts-file.")
    return texts


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except OSError as error:
        raise ConfigurationError(
            f"--prompts-file {path} cannot be read: {error.strerror}. Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"--prompts-file {path} is not UTF-8 text: {error}. Convert it."
        ) from error
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ConfigurationError(
                f"--prompts-file {path}: line {number} is empty. Each line is a prompt: remove it."
            )
    return lines


def _flags() -> Iterator[_Flag]:
    for component, component_type in typing.get_type_hints(Request).items():
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
            "--prompt=-5; see --help."
        )


def _parser(flags: list[_Flag]) -> _Parser:
    parser = _Parser(
        usage=_USAGE,
        description="Continue prompts with a model that megatron_memory.train has saved.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups = {
        component: parser.add_argument_group(title)
        for component, title in field_docstrings(Request).items()
    }
    for flag in flags:
        options: dict[str, Any] = dict(dest=flag.field.name, default=None, help=_help(flag))
        if flag.value_type.kind == "bool":
            options |= dict(action="store_true")
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
    return f"{name} is not a flag of the generation. {advice}"
