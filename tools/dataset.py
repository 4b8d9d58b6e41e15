"""Look at, check, merge and split the `.bin`/`.idx` pairs of tools/preprocess_data.py.

    python tools/dataset.py inspect data/corpus_text_document \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer
    python tools/dataset.py verify data/*.idx
    python tools/dataset.py merge --input data/a data/b --output-prefix data/both
    python tools/dataset.py split data/both --shares 0.99,0.01 --outputs data/train data/valid
    python tools/dataset.py stats data/train

A pair is named by the path that both files share; one of the files will do. Everything is read and
written in pieces: no command needs memory for a whole file.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

# The checkout holds more than this folder.
sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

from megatron_memory.data.index_files import check_indexed_dataset  # noqa: E402
from megatron_memory.data.indexed import contents, merge, split  # noqa: E402
from megatron_memory.data.indexed.format import TOKEN_DTYPES  # noqa: E402
from megatron_memory.data.indexed.manifest import read_manifest, tokenizer_warning  # noqa: E402
from megatron_memory.data.preprocess.tokenizer import (  # noqa: E402
    TextTokenizer,
    load_text_tokenizer,
)
from megatron_memory.exceptions import USER_ERRORS, ConfigurationError  # noqa: E402
from megatron_memory.output import accept_any_text  # noqa: E402

_NUM_IDS_SHOWN = 12
_SIZED_BY_FLAG = ("NullTokenizer", "TikTokenizer")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    accept_any_text()
    args = _parser().parse_args(argv)
    try:
        args.command(args)
    except (*USER_ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = _command(commands, "inspect", _inspect, "what a pair holds, and a sample of its text")
    command.add_argument("pairs", nargs="+", help="pairs")
    command.add_argument("--documents", type=_count, default=2, help="documents to show")
    command.add_argument("--first", type=_count, default=0, help="number of the first one shown")
    _add_tokenizer_flags(command)
    command = _command(commands, "verify", _verify, "read everything: offsets, ids, manifest")
    command.add_argument("pairs", nargs="+", help="pairs")
    _add_tokenizer_flags(command)
    command = _command(commands, "merge", _merge, "several pairs, in the order given, as one")
    command.add_argument(
        "--input", nargs="+", required=True, help="pairs, or folders whose pairs are sorted by name"
    )
    command.add_argument("--output-prefix", required=True, help="the new pair")
    command.add_argument(
        "--dtype",
        choices=[dtype.name for dtype in TOKEN_DTYPES.values()],
        help="of the new pair's ids; needed where the inputs' differ",
    )
    command = _command(commands, "split", _split, "cut a pair's documents, in order, into pairs")
    command.add_argument("pair", help="the pair")
    command.add_argument("--outputs", nargs="+", required=True, help="the new pairs")
    how = command.add_mutually_exclusive_group(required=True)
    how.add_argument("--shares", help="of the documents, one for each output, such as 0.99,0.01")
    how.add_argument(
        "--documents", type=_count, help="so many to the first output, the others to the second"
    )
    command = _command(commands, "stats", _stats, "lengths of documents, and which tokens occur")
    command.add_argument("pairs", nargs="+", help="pairs")
    command.add_argument("--top", type=_count, default=10, help="most frequent tokens to show")
    _add_tokenizer_flags(command)
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, run: Callable, text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    command.set_defaults(command=run)
    return command


def _add_tokenizer_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tokenizer-type", help="as for tools/preprocess_data.py")
    command.add_argument("--tokenizer-model", help="as for tools/preprocess_data.py")
    command.add_argument(
        "--vocab-size", type=_size, help="ids must be below it; default: tokenizer's"
    )
    command.set_defaults(tokenizer_hf_include_special_tokens=False)


def _count(text: str, least: int = 0) -> int:
    """A number of things.

    Raises:
        ArgumentTypeError: it is none, or out of range; argparse names the flag.
    """
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not least <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r:.80}: must be a whole number, at least {least}")
    return number


def _size(text: str) -> int:
    return _count(text, 1)


def _tokenizer(args: argparse.Namespace) -> TextTokenizer | None:
    if args.tokenizer_type is None:
        if args.tokenizer_model is not None:
            raise ConfigurationError("--tokenizer-model needs --tokenizer-type")
        return None
    return load_text_tokenizer(args)


def _prefix(name: str) -> str:
    for suffix in (".bin", ".idx"):
        if name.endswith(suffix):
            name = name.removesuffix(suffix)
            break
    # A file of its own name would be hidden, or lie where nobody looks for it.
    if os.path.basename(name) in ("", ".", ".."):
        raise ConfigurationError(
            f"{name!r}: is no name of a pair. Give the path that its .bin and .idx share, without "
            "their suffix"
        )
    return name


def _prefixes(names: Sequence[str]) -> list[str]:
    """Pairs by any of their names, each once."""
    return list(dict.fromkeys(map(_prefix, names)))


def _warn_of_another(tokenizer: TextTokenizer | None, prefix: str) -> None:
    warning = None if tokenizer is None else tokenizer_warning(prefix, tokenizer.hash)
    if warning is not None:
        print(warning, file=sys.stderr)


def _vocab_size(
    args: argparse.Namespace, tokenizer: TextTokenizer | None, prefix: str
) -> int | None:
    # Of some types it is a part of the tokenizer.
    if args.vocab_size is not None and args.tokenizer_type not in _SIZED_BY_FLAG:
        return args.vocab_size
    if tokenizer is not None:
        return tokenizer.vocab_size
    return ((read_manifest(prefix) or {}).get("tokenizer") or {}).get("vocab_size")


def _inspect(args: argparse.Namespace) -> None:
    tokenizer = _tokenizer(args)
    for prefix in _prefixes(args.pairs):
        pair = check_indexed_dataset(prefix)
        print(pair)
        print(f"  {pair.num_sequences:,} sequences")
        manifest = read_manifest(prefix)
        if manifest is None:
            print("  no manifest: where it comes from is not known")
        else:
            _print_manifest(manifest, tokenizer)
        if args.first >= pair.num_documents:
            raise ConfigurationError(
                f"--first {args.first}: {prefix} has documents 0 to {pair.num_documents - 1}"
            )
        for number in range(args.first, min(args.first + args.documents, pair.num_documents)):
            ids = contents.document(pair, number).tolist()
            shown = ", ".join(map(str, ids[:_NUM_IDS_SHOWN]))
            more = ", ..." if len(ids) > _NUM_IDS_SHOWN else ""
            print(f"  document {number}: {len(ids):,} tokens: {shown}{more}")
            if tokenizer is not None:
                print(f"    {tokenizer.decode(ids[:200])!r}")


def _print_manifest(manifest: dict, tokenizer: TextTokenizer | None) -> None:
    for name in ("made_by", "json_key", "append_eod", "skipped_lines"):
        if name in manifest:
            print(f"  {name}: {manifest[name]}")
    made_with = manifest.get("tokenizer")
    if made_with:
        print(
            f"  tokenizer: {made_with.get('type')} {made_with.get('model')}, "
            f"{made_with.get('vocab_size')} entries, hash {made_with.get('hash')}"
        )
        if tokenizer is not None and made_with.get("hash") != tokenizer.hash:
            print("  warning: the tokenizer given here is another one: the text below is not its")
    for source in manifest.get("sources", []):
        path, lines, checksum = (source.get(name) for name in ("path", "lines", "crc32"))
        print(f"  source: {path}, {lines} lines, crc32 {checksum}")


def _verify(args: argparse.Namespace) -> None:
    tokenizer = _tokenizer(args)
    for prefix in _prefixes(args.pairs):
        _warn_of_another(tokenizer, prefix)
        print(contents.verify(prefix, _vocab_size(args, tokenizer, prefix)))


def _merge(args: argparse.Namespace) -> None:
    prefixes = []
    for name in args.input:
        # A training keeps its cache in a folder beside the pair, of the pair's own name.
        is_folder = os.path.isdir(name) and not os.path.isfile(f"{name}.idx")
        prefixes += merge.pairs_in(name) if is_folder else [_prefix(name)]
    for warning in merge.merge(prefixes, _prefix(args.output_prefix), args.dtype):
        print(f"warning: {warning}", file=sys.stderr)
    print(check_indexed_dataset(_prefix(args.output_prefix)))


def _split(args: argparse.Namespace) -> None:
    outputs = [_prefix(name) for name in args.outputs]
    if args.documents is not None:
        split.split_after(_prefix(args.pair), outputs, args.documents)
    else:
        split.split(_prefix(args.pair), outputs, _shares(args.shares))
    for output in outputs:
        print(check_indexed_dataset(output))


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(
            f"--shares {text}: give numbers with commas between them, such as 0.99,0.01"
        ) from error


def _stats(args: argparse.Namespace) -> None:
    tokenizer = _tokenizer(args)
    for prefix in _prefixes(args.pairs):
        _warn_of_another(tokenizer, prefix)
        found = contents.statistics(prefix)
        pair = found.pair
        print(pair)
        mean = pair.num_tokens / pair.num_documents
        quantiles = " ".join(
            f"{share:.0%} {found.length_quantile(share):,}" for share in (0.01, 0.1, 0.5, 0.9, 0.99)
        )
        print(f"  tokens a document: mean {mean:,.1f}, longest {found.longest:,}; {quantiles}")
        print(f"  documents without tokens: {found.num_empty:,}")
        vocab_size = _vocab_size(args, tokenizer, prefix)
        if vocab_size is None:
            print("  ids that never occur: not known without --vocab-size or a tokenizer")
        else:
            print(f"  ids that never occur: {found.num_unused(vocab_size):,} of {vocab_size:,}")
        for number, count in found.most_frequent(args.top):
            text = "" if tokenizer is None else f"  {tokenizer.decode([number])!r}"
            print(f"  token {number:>8}: {count / pair.num_tokens:8.3%}{text}")


if __name__ == "__main__":
    # So that a batch system's SIGTERM removes unfinished files too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
