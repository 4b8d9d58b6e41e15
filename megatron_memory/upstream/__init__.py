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


def line_of(version: str) -> str:
    """`0.19.2` -> `0.19`."""
    return ".".join(version.split(".")[:2])


def fitting(name: str) -> ModuleType:
    """The module of that name for the installed megatron-core.

    Raises:
        ConfigurationError: it is of another line.
    """
    version = importlib.metadata.version("megatron-core")
    line = line_of(version)
    if line not in LINES:
        raise ConfigurationError(
            f"megatron-core {version} is not supported: its internals change from version to "
            f"version, and {' and '.join(LINES)} are known here. `make setup` installs the one "
            "that fits this Python"
        )
    return import_module(f"{__name__}.{name}_{line.replace('.', '_')}")


core = fitting("core")
LINE = line_of(importlib.metadata.version("megatron-core"))
"""Of the installed version."""
