"""A small valid command line, which each test changes in one place."""

from collections.abc import Sequence

from megatron_memory.config import Config, parse_arguments

BASE = {
    "--num-layers": "4",
    "--hidden-size": "64",
    "--num-attention-heads": "4",
    "--seq-length": "32",
    "--micro-batch-size": "1",
    "--global-batch-size": "8",
    "--train-iters": "100",
    "--lr": "1e-3",
    "--data-path": "corpus_text_document",
    "--tokenizer-type": "HuggingFaceTokenizer",
}


def base_arguments(*without: str) -> list[str]:
    """The valid command line, without the flags named."""
    return [word for flag, value in BASE.items() if flag not in without for word in (flag, value)]


def parse(arguments: str = "", without: Sequence[str] = ()) -> Config:
    """Parse the valid command line with further arguments, which no value with spaces is among."""
    return parse_arguments(base_arguments(*without) + arguments.split(), notify=_refuse_notes)


def _refuse_notes(note: str) -> None:
    raise AssertionError(f"unexpected note: {note}")
