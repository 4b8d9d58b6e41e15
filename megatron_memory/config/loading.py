"""Command line and configuration file -> `Config`, and back to a file."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_memory.config.convert import WrongValue, convert, problem_with
from megatron_memory.config.flags import (
    Flag,
    Spelling,
    all_flags,
    all_spellings,
    component_types,
    flag_name,
    help_text,
    key_of,
)
from megatron_memory.config.megatron_flags import why_accepted, why_refused
from megatron_memory.config.nearest import suggest
from megatron_memory.config.problems import raise_problems
from megatron_memory.config.schema import Config
from megatron_memory.exceptions import ConfigurationError
from megatron_memory.reading.documents import LARGEST_YAML, parse_yaml_pairs, read_bounded
from megatron_memory.reading.pickles import UnsafeFile

_OWN_NAMES = ("config", "help")


def parse_arguments(
    argv: Sequence[str] | None = None, *, notify: Callable[[str], None] | None = None
) -> Config:
    """The configuration that a command line (`sys.argv[1:]`) and its `--config` file describe.

    `notify` receives one line for each flag that is accepted but has no effect here; by default
    the first rank prints it. Raises `ConfigurationError` with everything that is wrong with single
    flags and keys; what depends on several of them is for `check_config`. `--help` prints and
    exits.
    """
    written = _scan(sys.argv[1:] if argv is None else argv)
    if any(entry.name in ("--help", "-h") for entry in written):
        print(help_text())
        raise SystemExit(0)
    reader = _Reader()
    config_files = [entry for entry in written if key_of(entry.name) == "config"]
    if config_files:
        _read_file_into(reader, _only_config_file(config_files))
    for entry in written:
        if key_of(entry.name) not in _OWN_NAMES:
            reader.read_argument(entry)
    config = reader.build()
    for note in reader.notes:
        (notify or _print_on_first_rank)(note)
    return config


def load_config(path: str | os.PathLike[str]) -> Config:
    """The configuration in a file that `save_config` or a user wrote.

    Raises `ConfigurationError` where the file is missing, unreadable or wrong.
    """
    reader = _Reader()
    _read_file_into(reader, str(path))
    return reader.build()


def check_values(config: Config) -> None:
    """Check each value by itself, of a configuration that was made of another program's.

    Raises `ConfigurationError` where a value is of the wrong type, or out of its range.
    """
    raise_problems(
        problem
        for flag in all_flags().values()
        if (problem := _problem_with_field(config, flag)) is not None
    )


def _problem_with_field(config: Config, flag: Flag) -> str | None:
    value = getattr(getattr(config, flag.component), flag.field.name)
    try:
        converted = convert(flag.value_type, flag.accepts_none, value)
    except WrongValue as wrong:
        return f"{flag.spelled} is {value!r:.80}, but expects {wrong}."
    # Text that means a number is for users to write, not for a value to be.
    if converted != value or isinstance(converted, str) != isinstance(value, str):
        return f"{flag.spelled} is {value!r:.80}, but expects {flag.value_type.expected}."
    return problem_with(flag.spelled, converted, flag.value_type, flag.option)


def save_config(config: Config, path: str | os.PathLike[str], *, omit: Sequence[str] = ()) -> None:
    """Write every setting to a YAML file that `load_config` and `--config` read.

    The file appears under its name only when it is complete. Call it on one rank. The components
    named by `omit` are left out: `--config` then asks for what they require.
    """
    values: dict[str, Any] = {}
    for key, flag in all_flags().items():
        if flag.component in omit:
            continue
        value = getattr(getattr(config, flag.component), flag.field.name)
        values[key] = list(value) if isinstance(value, tuple) else value
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class _Written:
    """One flag of a command line with the values after it."""

    name: str
    values: list[str]


def _scan(argv: Sequence[str]) -> list[_Written]:
    """Group a command line by its flags. A value that begins with -- must follow an = sign."""
    entries: list[_Written] = []
    for word in argv:
        if word == "-h":
            entries.append(_Written(word, []))
        elif word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            entries.append(_Written(name, [value] if equals else []))
        elif entries:
            entries[-1].values.append(word)
        else:
            raise ConfigurationError(
                f"{word!r} stands before any flag: every setting is a flag. See --help."
            )
    return entries


def _only_config_file(entries: Sequence[_Written]) -> str:
    values = [value for entry in entries for value in entry.values]
    if len(values) != 1:
        raise ConfigurationError(
            f"--config takes one YAML file, but got {len(values)}: {' '.join(values)}. "
            "Give one file; flags on the command line override it."
        )
    return values[0]


class _Reader:
    """Collects settings and the problems with them; later settings win over earlier ones."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []

    def read_argument(self, entry: _Written) -> None:
        """A flag with its values from the command line."""
        shown = entry.name
        spelling = self._look_up(shown, shown, entry.values)
        if spelling is None:
            return
        if spelling.is_switch:
            if entry.values:
                self.problems.append(_switch_with_value(shown, spelling, entry.values))
            else:
                self.values[spelling.flag.key] = spelling.value
        elif spelling.flag.value_type.many:
            self._set(shown, spelling.flag, entry.values)
        elif len(entry.values) == 1:
            self._set(shown, spelling.flag, entry.values[0])
        else:
            expected = spelling.flag.value_type.expected
            got = " ".join(entry.values) or "nothing"
            self.problems.append(
                f"{shown} takes one value, {expected}, but got {got}. "
                "Put a value that contains spaces in quotes."
            )

    def read_key(self, key: Any, raw: Any, path: str) -> str | None:
        """A key and value of a configuration file. Returns the flag's own key, if it has one."""
        shown = f"{key} in {path}"
        if not isinstance(key, str):
            self.problems.append(f"{shown} is not a setting's name: put it in quotes.")
            return None
        if isinstance(raw, dict):
            self.problems.append(
                f"{shown} holds keys of its own: settings are flat. Write each of "
                f"{', '.join(map(str, raw))} at the start of a line."
            )
            return None
        values = [str(value) for value in (raw if isinstance(raw, list) else [raw])]
        spelling = self._look_up(key, shown, values)
        if spelling is None:
            return None
        flag = spelling.flag
        if not spelling.is_switch or key_of(key) == flag.key:
            self._set(shown, flag, raw)
        elif not isinstance(raw, bool):
            self.problems.append(f"{shown} is {raw!r}, but expects true or false.")
        elif raw:
            self.values[flag.key] = spelling.value
        elif flag.value_type.kind == "bool":
            self.values[flag.key] = not spelling.value
        return flag.key

    def _look_up(self, name: str, shown: str, values: Sequence[str]) -> Spelling | None:
        """The flag of this name; None where there is none, or none with an effect here."""
        key = key_of(name)
        spelling = all_spellings().get(key)
        if spelling is not None:
            return spelling
        accepted, refused = why_accepted(key, values), why_refused(key)
        if accepted is not None:
            self.notes.append(f"{shown} has no effect here: {accepted}.")
        elif refused is not None:
            self.problems.append(f"{shown} is known to Megatron-LM, but not supported: {refused}.")
        else:
            self.problems.append(f"{shown} is not a known setting. {suggest(key)}")
        return None

    def _set(self, shown: str, flag: Flag, raw: Any) -> None:
        try:
            value = convert(flag.value_type, flag.accepts_none, raw)
        except WrongValue as wrong:
            self.problems.append(f"{shown} is {raw!r}, but expects {wrong}.")
            return
        problem = problem_with(shown, value, flag.value_type, flag.option)
        if problem is not None:
            self.problems.append(problem)
        else:
            self.values[flag.key] = value

    def build(self) -> Config:
        """The configuration, or a `ConfigurationError` with all problems."""
        raise_problems(self.problems or [*self._missing(), *self._without_memory()])
        settings: dict[str, dict[str, Any]] = {component: {} for component in component_types()}
        for key, value in self.values.items():
            flag = all_flags()[key]
            settings[flag.component][flag.field.name] = value
        components = {
            component: component_type(**settings[component])
            for component, component_type in component_types().items()
        }
        return Config(**components)

    def _missing(self) -> Iterable[str]:
        flags = all_flags().values()
        missing = [flag for flag in flags if flag.required and flag.key not in self.values]
        saved = Path(self.values.get("load") or "") / "config.yaml"
        hint = f" {saved} may have it: --config {saved}" if saved.is_file() else ""
        for flag in missing:
            yield f"{flag.spelled} is required: {flag.text}{hint}"
            hint = ""

    def _without_memory(self) -> Iterable[str]:
        # A file may keep its memory settings for a run that turns memory off by
        # `--memory-layers none`; settings without any `memory_layers` are a forgotten flag.
        if "memory_layers" in self.values:
            return
        for key in self.values:
            if all_flags()[key].component == "memory":
                yield (
                    f"{flag_name(key)} has no effect without --memory-layers: give the layers, "
                    "for example --memory-layers centered:3:8, or none for a model without memory."
                )


def _switch_with_value(shown: str, spelling: Spelling, values: Sequence[str]) -> str:
    message = f"{shown} takes no value, but got {' '.join(values)}."
    if spelling.flag.value_type.kind == "bool":
        names = [
            flag_name(name)
            for name, other in all_spellings().items()
            if other.flag is spelling.flag and other.value != spelling.value
        ]
        message += f" Write {shown} alone, or {names[0]} for the opposite."
    return message


def _read_file_into(reader: _Reader, path: str) -> None:
    seen: dict[str, str] = {}
    for key, raw in _read_yaml(path):
        flag_key = reader.read_key(key, raw, path)
        if flag_key is None:
            continue
        if flag_key in seen:
            reader.problems.append(
                f"{path} sets {flag_key} twice, as {seen[flag_key]} and {key}: remove one."
            )
        seen[flag_key] = key


def _read_yaml(path: str) -> list[tuple[Any, Any]]:
    """The top-level keys and values of a YAML file, repeated keys included."""
    try:
        return parse_yaml_pairs(read_bounded(path, LARGEST_YAML))
    except OSError as error:
        raise ConfigurationError(
            f"The configuration file {path} (--config) cannot be read: {error.strerror}. "
            "Check the path."
        ) from error
    except UnsafeFile as error:
        raise ConfigurationError(
            f"The configuration file {path} (--config) cannot be read: {error}."
        ) from error


def _print_on_first_rank(note: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(note, file=sys.stderr)
