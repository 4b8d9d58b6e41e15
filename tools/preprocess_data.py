"""Tokenize text files into the `.bin`/`.idx` pairs that --data-path takes.

    python tools/preprocess_data.py --input corpus.jsonl.gz --output-prefix data/corpus \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer --append-eod --workers 8

Flags and output are those of Megatron-LM's tool of this name, byte for byte.
"""

import argparse
import dataclasses
import difflib
import signal
import sys
from typing import Any

from megatron_memory.config.option import field_docstrings
from megatron_memory.data.preprocess.options import PreprocessOptions
from megatron_memory.data.preprocess.pipeline import preprocess
from megatron_memory.data.preprocess.workers import WorkerError
from megatron_memory.exceptions import ConfigurationError, DataError

_NOT_HERE = {
    "--split-sentences": "sentence splitting serves BERT and T5, which are not trained here",
    "--keep-newlines": "it belongs to --split-sentences, which is not supported",
    "--lang": "it belongs to --split-sentences, which is not supported",
    "--partitions": "the workers share one input without it; use --workers",
    "--keep-sequential-samples": "documents always keep their order; leave the flag out",
    "--vocab-file": "give the tokenizer's folder: --tokenizer-type HuggingFaceTokenizer "
    "--tokenizer-model DIR",
    "--merge-file": "give the tokenizer's folder: --tokenizer-type HuggingFaceTokenizer "
    "--tokenizer-model DIR",
    "--dataset-impl": "there is one format, the mmap one; leave the flag out",
}


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    try:
        prefixes = preprocess(parse_options(sys.argv[1:] if argv is None else argv))
    except (ConfigurationError, DataError, WorkerError, OSError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail("interrupted")
    for prefix in prefixes:
        print(f"{prefix}.bin\n{prefix}.idx")
    return 0


def parse_options(argv: list[str]) -> PreprocessOptions:
    """Options from command-line flags, which are the fields of PreprocessOptions.

    Raises:
        ConfigurationError: an unknown flag, or a value out of range.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    docstrings = field_docstrings(PreprocessOptions)
    for field in dataclasses.fields(PreprocessOptions):
        _add_flag(parser, field, docstrings[field.name])
    _refuse_unknown_flags(argv, list(parser._option_string_actions))
    values: dict[str, Any] = vars(parser.parse_args(argv))
    for name in ("input", "json_keys"):
        values[name] = tuple(values[name])
    return PreprocessOptions(**values)


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, text: str) -> None:
    flag = "--" + field.name.replace("_", "-")
    help_text = text.replace("%", "%%")
    if field.type is bool:
        parser.add_argument(flag, action="store_true", help=help_text)
        return
    required = field.default is dataclasses.MISSING
    if not required and field.default is not None:
        help_text += " Default: %(default)s."
    parser.add_argument(
        flag,
        help=help_text,
        required=required,
        default=None if required else field.default,
        type=int if field.type in (int, int | None) else str,
        nargs="+" if field.type == tuple[str, ...] else None,
    )


def _refuse_unknown_flags(argv: list[str], known: list[str]) -> None:
    for argument in argv:
        flag = argument.split("=")[0]
        if not flag.startswith("--") or flag in known:
            continue
        if flag in _NOT_HERE:
            raise ConfigurationError(f"{flag}: {_NOT_HERE[flag]}")
        nearest = difflib.get_close_matches(flag, known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "--help lists the flags"
        raise ConfigurationError(f"{flag}: unknown flag; {hint}")


def _fail(error: Exception | str) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    # So that a batch system's SIGTERM removes unfinished files too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
