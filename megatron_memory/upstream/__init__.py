"""What differs between the two lines of megatron-core that are supported.

Of each module here there is one a line, with the same names. Those called `core_*` load in no time;
the others import megatron-core, which takes seconds and must be prepared first
(`prepare_megatron`).
"""

import importlib.metadata
from importlib import import_module
from types import ModuleType

from megatron_memory.exceptions import ConfigurationError

LINES = ("0.16", "0.19")
"""Of megatron-core, as the modules' names end."""


def installed_line() -> str:
    """Of 0.19.2: `0.19`.

    Raises:
        ConfigurationError: megatron-core is missing, or of another line.
    """
    try:
        version = importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigurationError(
            "megatron-core is not installed: run `make setup`, or use the environment that it made"
        ) from None
    line = ".".join(version.split(".")[:2])
    if line not in LINES:
        raise ConfigurationError(
            f"megatron-core {version} is not supported: its internals change from version to "
            f"version, and {' and '.join(LINES)} are known here. `make setup` installs the one "
            "that fits this Python"
        )
    return line


def fitting(name: str) -> ModuleType:
    """The module of that name for the installed megatron-core.

    Raises:
        ConfigurationError: see `installed_line`.
    """
    return import_module(f"{__name__}.{name}_{installed_line().replace('.', '_')}")


core = fitting("core")
LINE = installed_line()
