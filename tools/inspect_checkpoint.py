"""Say what is in a checkpoint of this program, of the memory paper's public reference or of Hugging
Face, or how two differ.

python tools/inspect_checkpoint.py runs/mine
python tools/inspect_checkpoint.py --diff runs/mine runs/exported
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from megatron_memory.config.command import parse_command  # noqa: E402
from megatron_memory.entry import run_entry  # noqa: E402
from megatron_memory.inspection.options import Inspection  # noqa: E402

_USAGE = "python tools/inspect_checkpoint.py DIR [--diff DIR] [--tensors GLOB] [--json]"
_EPILOG = """\
exit code: 0 where all is well, or two are equal; 1 for NaN, infinite numbers, damage, a checkpoint
that cannot be read as a model (unless --raw is given), or where two differ; 2 for errors.
Tensors are read by blocks: memory does not grow with the model, but for 8 bytes a row of a table.
No code in a checkpoint is run.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    return run_entry(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    inspection = parse_command(Inspection, argv, usage=_USAGE, epilog=_EPILOG, positional="load")
    # megatron-core takes seconds to import: only once the flags are known to be good.
    from megatron_memory.runtime import prepare_megatron

    prepare_megatron("cpu")
    from megatron_memory.inspection.program import inspect

    return inspect(inspection, lambda text: print(text, flush=True))


if __name__ == "__main__":
    sys.exit(main())
