"""What differs between the two lines of megatron-core that are supported.

Each line has a module with the same names, of which `core` is the one that fits the installed
version. Nothing here imports megatron-core before a function is called: it must be prepared first
(`prepare_megatron`), and takes seconds to load.
"""

import importlib.metadata
from importlib import import_module
from types import ModuleType

from megatron_memory.exceptions import ConfigurationError

LINES = {"0.16": "core_0_16", "0.19": "core_0_19"}
"""Line of megatron-core -> the module that knows it."""


def _module() -> ModuleType:
    version = importlib.metadata.version("megatron-core")
    line = ".".join(version.split(".")[:2])
    if line not in LINES:
        raise ConfigurationError(
            f"megatron-core {version} is not supported: its internals change from version to "
            f"version, and {' and '.join(LINES)} are known here. `make setup` installs the one "
            "that fits this Python"
        )
    return import_module(f"{__name__}.{LINES[line]}")


core = _module()
