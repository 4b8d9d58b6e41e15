"""Give a trained model more memory, without starting again.

    python tools/grow.py add-memory --load runs/dense --save runs/with-memory --memory-beside-mlp \\
        --memory-layers centered:3:8
    python tools/grow.py grow --load runs/with-memory --save runs/larger --half-keys 2048

See docs/growing.md for what stays the same, and --help of each for its flags.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from megatron_memory.config.command import parse_command  # noqa: E402
from megatron_memory.conversion.growth.options import AddMemory, Grow  # noqa: E402
from megatron_memory.entry import run_entry  # noqa: E402
from megatron_memory.exceptions import ConfigurationError  # noqa: E402

_COMMANDS = {
    "add-memory": "--load DENSE --save NEW --memory-layers L (--memory-beside-mlp | --replace)",
    "grow": "--load DIR --save NEW (--half-keys N | --value-dim D)",
}
_EPILOG = """\
Tensors are read and written one by one, tables in blocks of rows: memory does not grow with the
model, but for --verify. The new folder appears under its name only when it is complete.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    return run_entry(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> int:
    name, flags = (argv or [""])[0], argv[1:]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in _COMMANDS:
        raise ConfigurationError(
            f"{name or 'nothing'!r} is not a command of this tool: begin with one of "
            f"{', '.join(_COMMANDS)}."
        )
    usage = f"python tools/grow.py {name} {_COMMANDS[name]}"
    command: AddMemory | Grow
    if name == "add-memory":
        command = parse_command(AddMemory, flags, usage=usage, epilog=_EPILOG)
    else:
        command = parse_command(Grow, flags, usage=usage, epilog=_EPILOG)
    # megatron-core takes seconds to import: only once the flags are known to be good.
    from megatron_memory.runtime import prepare_megatron

    prepare_megatron("cpu")
    from megatron_memory.conversion.growth.command import run_add_memory, run_grow

    try:
        if isinstance(command, AddMemory):
            run_add_memory(command, _say)
        else:
            run_grow(command, _say)
    except RuntimeError as error:
        # So torch says it.
        if "can't allocate memory" not in str(error):
            raise
        raise ConfigurationError(
            "a tensor of the larger model, or of its comparison, does not fit into this machine's "
            "memory: lower the sizes that the flags give, or --probe-sequences."
        ) from error
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    # So that a batch system's SIGTERM removes unfinished files too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
