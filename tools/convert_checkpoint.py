"""Convert checkpoints between this program, the memory paper's public reference and Hugging Face.

python tools/convert_checkpoint.py --from hf --to megatron --load llama --save runs/llama
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from megatron_memory.config.command import parse_command  # noqa: E402
from megatron_memory.conversion.options import Conversion  # noqa: E402
from megatron_memory.entry import run_entry  # noqa: E402

_USAGE = "python tools/convert_checkpoint.py --from FORMAT --to FORMAT --load DIR --save DIR"
_EPILOG = """\
formats: megatron, lingua, hf
Tensors are read and written one by one, tables in blocks: memory does not grow with the model. No
code in a checkpoint is run. The new folder appears under its name only when it is complete.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    return run_entry(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    conversion = parse_command(Conversion, argv, usage=_USAGE, epilog=_EPILOG)
    # megatron-core takes seconds to import: only once the flags are known to be good.
    from megatron_memory.runtime import prepare_megatron

    prepare_megatron("cpu")
    from megatron_memory.conversion.convert import convert

    convert(conversion, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    # So that a batch system's SIGTERM removes unfinished files too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
