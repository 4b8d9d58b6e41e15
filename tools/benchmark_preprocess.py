"""How fast text becomes tokens, against Megatron-LM's tool.

    python tools/benchmark.py preprocess

Each round tokenizes the same file by Megatron-LM's tool, by tools/preprocess_data.py, and by
gigatoken alone, one after the other. The first two are measured from the start of their process to
its end, and must write the same bytes. gigatoken alone is timed from text in a file to ids in
memory, nothing written and no process started: the limit for this text, tokenizer and machine.

Megatron-LM's tool needs a checkout of it (--megatron-lm). Without one its loop stands in for it,
on megatron-core's own classes: json.loads and the tokenizer for one document at a time in the
processes of a multiprocessing.Pool (imap, 32 lines at a time), and in the parent
IndexedDatasetBuilder.add_document. The tool itself takes longer to start: it imports more.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_TYPE = "HuggingFaceTokenizer"


def main(argv: Sequence[str]) -> int:
    """Run the rounds and print the table; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.stand_in:
        _stand_in(args.input, args.stand_in, args.tokenizer_model, args.workers)
        return 0
    if args.gigatoken:
        print(_gigatoken_seconds(args.input, args.tokenizer_model))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        _unpack(Path(args.input), text)
        rounds = [_one_round(args, text, Path(folder)) for _ in range(args.rounds)]
        _print_table(args, text.stat().st_size / 1e6, rounds)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py preprocess",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = ROOT / "examples/data"
    parser.add_argument(
        "--input", default=str(data / "wordnet.jsonl.gz"), help="JSON lines, or .gz"
    )
    parser.add_argument("--tokenizer-model", default=str(data / "tokenizer"), help="a folder")
    parser.add_argument("--workers", type=int, default=2, help="processes of each tool")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--megatron-lm", help="a checkout of Megatron-LM that runs in this Python")
    parser.add_argument("--stand-in", help=argparse.SUPPRESS)
    parser.add_argument("--gigatoken", action="store_true", help=argparse.SUPPRESS)
    return parser


def _unpack(source: Path, target: Path) -> None:
    content = source.read_bytes()
    target.write_bytes(gzip.decompress(content) if source.suffix == ".gz" else content)


def _one_round(args: argparse.Namespace, text: Path, folder: Path) -> dict[str, float]:
    """Seconds of each."""
    flags = ["--input", str(text), "--workers", str(args.workers), "--append-eod"]
    flags += ["--tokenizer-type", _TYPE, "--tokenizer-model", args.tokenizer_model]
    own = [__file__, "--input", str(text), "--tokenizer-model", args.tokenizer_model]
    own += ["--workers", str(args.workers)]
    if args.megatron_lm:
        tool = [str(Path(args.megatron_lm) / "tools/preprocess_data.py"), *flags]
        theirs = _seconds([*tool, "--output-prefix", str(folder / "theirs")], args.megatron_lm)
    else:
        theirs = _seconds([*own, "--stand-in", str(folder / "theirs")])
    tool = [str(ROOT / "tools/preprocess_data.py"), *flags]
    ours = _seconds([*tool, "--output-prefix", str(folder / "ours")])
    for suffix in ("bin", "idx"):
        written = [
            (folder / f"{n}_text_document.{suffix}").read_bytes() for n in ("theirs", "ours")
        ]
        if written[0] != written[1]:
            sys.exit(f"the two tools wrote different .{suffix} files")
    alone = subprocess.run(
        [sys.executable, *own, "--gigatoken"],
        env={**_environment(), "RAYON_NUM_THREADS": str(args.workers)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return {"theirs": theirs, "ours": ours, "gigatoken": float(alone.stdout)}


def _environment(first: str | None = None) -> dict[str, str]:
    folders = [first, str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def _seconds(command: list[str], first_in_path: str | None = None) -> float:
    """From the start of a Python process to its end."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], env=_environment(first_in_path), capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{done.stderr}\n{command[0]} ended with exit code {done.returncode}; see above")
    return seconds


class _Encoder:
    """The worker of Megatron-LM's tool."""

    tokenizer: Any

    def __init__(self, tokenizer_model: str) -> None:
        self.tokenizer_model = tokenizer_model

    def start(self) -> None:
        from megatron_memory.data.tokenizers import build_tokenizer

        _Encoder.tokenizer = build_tokenizer(_TYPE, self.tokenizer_model)

    def encode(self, line: str) -> tuple[list[int], list[int], int]:
        ids = list(_Encoder.tokenizer.tokenize(json.loads(line)["text"]))
        if ids:
            ids.append(_Encoder.tokenizer.eod)
        return ids, [len(ids)] if ids else [], len(line)


def _stand_in(path: str, output_prefix: str, tokenizer_model: str, workers: int) -> None:
    from megatron_memory.runtime import prepare_megatron

    prepare_megatron()
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    from megatron_memory.data.tokenizers import build_tokenizer

    encoder = _Encoder(tokenizer_model)
    vocab_size = build_tokenizer(_TYPE, tokenizer_model).vocab_size
    prefix = f"{output_prefix}_text_document"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
    with (
        open(path, encoding="utf-8") as lines,
        multiprocessing.Pool(workers, initializer=encoder.start) as pool,
    ):
        for ids, lengths, _ in pool.imap(encoder.encode, lines, 32):
            builder.add_document(ids, lengths)
    builder.finalize(f"{prefix}.idx")


def _gigatoken_seconds(path: str, tokenizer_model: str) -> float:
    from gigatoken import JsonlFileSource, Tokenizer

    tokenizer = Tokenizer(tokenizer_model)
    tokenizer.encode_batch(["imports what it needs, which is not to be timed"])
    began = time.perf_counter()
    tokenizer.encode_files(JsonlFileSource([path], field="text"))
    return time.perf_counter() - began


def _print_table(
    args: argparse.Namespace, megabytes: float, rounds: list[dict[str, float]]
) -> None:
    theirs = "Megatron-LM's tool" if args.megatron_lm else "Megatron-LM's loop"
    print(f"{args.input}: {megabytes:.1f} MB, {args.workers} workers, {os.cpu_count()} cores")
    for name, key in ((theirs, "theirs"), ("ours", "ours"), ("gigatoken alone", "gigatoken")):
        seconds = statistics.median(measured[key] for measured in rounds)
        print(f"{name:20}{seconds:8.2f} s{megabytes / seconds:10.2f} MB/s")
    for what, one, other in (
        (f"times as fast as {theirs}", "theirs", "ours"),
        ("share of the limit", "gigatoken", "ours"),
    ):
        ratios = [measured[one] / measured[other] for measured in rounds]
        listed = ", ".join(f"{ratio:.3g}" for ratio in ratios)
        print(f"ours, {what}, round by round: {listed} (median {statistics.median(ratios):.3g})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
