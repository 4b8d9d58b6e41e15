"""Tokenize text files into the `.bin`/`.idx` pairs that --data-path takes.

    python tools/preprocess_data.py --input corpus.jsonl.gz --output-prefix data/corpus \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer --append-eod --workers 8

Flags and output are those of Megatron-LM's tool of this name, byte for byte.
"""

import dataclasses
import signal
import sys
from collections.abc import Sequence

from megatron_memory.config.command import parse_command
from megatron_memory.data.preprocess.options import PreprocessOptions
from megatron_memory.data.preprocess.pipeline import preprocess
from megatron_memory.data.preprocess.workers import WorkerError
from megatron_memory.exceptions import ConfigurationError, DataError
from megatron_memory.output import accept_any_text

_USAGE = "python tools/preprocess_data.py --input FILE --output-prefix PATH --tokenizer-type NAME"
_OF_A_FOLDER = (
    "give the tokenizer's folder: --tokenizer-type HuggingFaceTokenizer --tokenizer-model"
)
_OF_SENTENCES = "sentence splitting serves BERT and T5, which are not trained here"
_OF_WORKERS = "give --workers a number; the progress lines say how fast it is"
_NOT_HERE = {
    "--split-sentences": _OF_SENTENCES,
    "--keep-newlines": _OF_SENTENCES,
    "--lang": _OF_SENTENCES,
    "--vocab-file": _OF_A_FOLDER,
    "--merge-file": _OF_A_FOLDER,
    "--find-optimal-num-workers": _OF_WORKERS,
    "--workers-to-check": _OF_WORKERS,
    "--max-documents": _OF_WORKERS,
}
_WITHOUT_EFFECT = {
    "--partitions": "all workers share one input, which is never cut",
    "--keep-sequential-samples": "documents always keep their order",
    "--dataset-impl": "there is one format, Megatron's mmap",
}
"""Flags of Megatron-LM's tool that scripts may go on giving."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Request:
    """Tokenize text into the .bin/.idx pairs that --data-path takes."""

    options: PreprocessOptions
    """Flags, with the names and meanings of Megatron-LM's preprocess_data.py"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    accept_any_text()
    try:
        prefixes = preprocess(parse_options(sys.argv[1:] if argv is None else argv))
    except (ConfigurationError, DataError, WorkerError, OSError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail("interrupted")
    for prefix in prefixes:
        print(f"{prefix}.bin\n{prefix}.idx")
    return 0


def parse_options(argv: Sequence[str]) -> PreprocessOptions:
    """Options from command-line flags, which are the fields of PreprocessOptions.

    Raises:
        ConfigurationError: an unknown flag, or a value out of range.
    """
    known: list[str] = []
    skipping = False
    for word in argv:
        name = word.partition("=")[0].replace("_", "-") if word.startswith("--") else ""
        if name in _NOT_HERE:
            raise ConfigurationError(f"{name}: {_NOT_HERE[name]}")
        if name in _WITHOUT_EFFECT:
            print(f"{name} has no effect: {_WITHOUT_EFFECT[name]}", file=sys.stderr)
        # A flag that is left out takes its value with it.
        skipping = name in _WITHOUT_EFFECT or (skipping and not name)
        known += [] if skipping else [word]
    return parse_command(_Request, known, usage=_USAGE).options


def _fail(error: Exception | str) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    # So that a batch system's SIGTERM removes unfinished files too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
