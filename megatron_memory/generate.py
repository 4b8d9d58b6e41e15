"""Continue prompts with a model that `megatron_memory.train` has saved.

    python -m megatron_memory.generate --load DIR --prompt TEXT [--prompt TEXT ...] [--flags]

All flags: `--help`. On N processes: `torchrun --nproc-per-node N -m megatron_memory.generate
--tensor-model-parallel-size N ...`, whatever the training used.

Exit codes: 0; 2 an error in flags, prompts, tokenizer or checkpoint (the message says which); 1
anything else.
"""

import os
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_memory.entry import run_entry

if TYPE_CHECKING:
    from megatron_memory.inference.generator import Completion


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on this rank; returns its exit code."""
    return run_entry(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    from megatron_memory.inference.arguments import parse_request, read_prompts

    # megatron-core warns about itself, and torch about names it uses: nothing for a user to fix.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    request = parse_request(argv)
    prompts = read_prompts(request.prompts)
    from megatron_memory.runtime import prepare_megatron

    backend = prepare_megatron(request.source.device)
    from megatron_memory.inference.generator import load_generator
    from megatron_memory.runtime.distributed import shutdown_distributed

    try:
        generator = load_generator(request.source, backend)
        _say(f"loaded {generator.saved.folder}")
        for note in generator.notes:
            _say(note)
        if generator.kernels is not None:
            _say(generator.kernels)
        started = time.perf_counter()
        completions = generator.generate(
            prompts,
            request.sampling,
            prepend_eod=request.prompts.prepend_eod,
            max_batch_size=request.prompts.max_batch_size,
        )
        _report(completions, time.perf_counter() - started)
    finally:
        shutdown_distributed()
    return 0


def _report(completions: list["Completion"], seconds: float) -> None:
    for completion in completions:
        _say(_shown(completion))
    num_tokens = sum(len(completion.tokens) for completion in completions)
    _say(f"\n{num_tokens} tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s")


def _shown(completion: "Completion") -> str:
    ending = "end of document" if completion.reached_end else f"{len(completion.tokens)} tokens"
    return f"\nprompt> {completion.prompt}\n{completion.prompt}{completion.text} [{ending}]"


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
