"""Reads, tokenizes and writes, in the order of the input."""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator

from megatron_memory.data.index_files import check_indexed_dataset
from megatron_memory.data.indexed.format import smallest_dtype
from megatron_memory.data.indexed.lock import OutputLock
from megatron_memory.data.indexed.manifest import read_manifest
from megatron_memory.data.preprocess.blocks import Block, RecordLimit
from megatron_memory.data.preprocess.documents import read_documents
from megatron_memory.data.preprocess.encoding import BatchEncoder, DocumentEncoder, list_encoder
from megatron_memory.data.preprocess.fast_bpe import FastEncoder, TokenMismatch
from megatron_memory.data.preprocess.identity import check_same_run, identity_of, manifests_of
from megatron_memory.data.preprocess.inputs import STANDARD_INPUT, expand_inputs, size_of
from megatron_memory.data.preprocess.journal import Identity, Journal, identity_hash
from megatron_memory.data.preprocess.options import PreprocessOptions
from megatron_memory.data.preprocess.outputs import Outputs, finish_publishing, remove_leftovers
from megatron_memory.data.preprocess.progress import Progress
from megatron_memory.data.preprocess.skipping import SkippedLines
from megatron_memory.data.preprocess.sources import read_blocks
from megatron_memory.data.preprocess.tokenizer import TextTokenizer, load_text_tokenizer
from megatron_memory.data.preprocess.workers import ordered_map
from megatron_memory.data.tokenizers import no_end_of_document
from megatron_memory.exceptions import DataError

# Documents of the first block on which gigatoken is compared with the tokenizer itself.
_NUM_COMPARED = 100


def preprocess(options: PreprocessOptions) -> list[str]:
    """Tokenize text files into `.bin`/`.idx` pairs, byte for byte as Megatron-LM's own tool.

    Returns:
        The prefixes written, one for each key: what `--data-path` takes.

    Raises:
        ConfigurationError: flags that do not fit together.
        DataError: an input or the tokenizer cannot be read, a line is bad, or the disk is full;
            nothing is left under the outputs' names.
        WorkerError: a worker process died.
    """
    paths = expand_inputs(options.input)
    # The tokenizers library warns, and may deadlock, when it forks with threads of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    tokenizer = load_text_tokenizer(options)
    if options.append_eod and tokenizer.eod is None:
        raise no_end_of_document(options.tokenizer_model)
    prefixes = {key: f"{options.output_prefix}_{key}_document" for key in options.json_keys}
    with contextlib.ExitStack() as stack:
        for prefix in prefixes.values():
            stack.enter_context(OutputLock(prefix))
        _Run(options, paths, prefixes, tokenizer).run()
    return list(prefixes.values())


class _Run:
    """One run, whose outputs are locked."""

    def __init__(
        self,
        options: PreprocessOptions,
        paths: list[str],
        prefixes: dict[str, str],
        tokenizer: TextTokenizer,
    ) -> None:
        self.options = options
        self.paths = paths
        self.prefixes = prefixes
        self.tokenizer = tokenizer
        self.dtype = smallest_dtype(tokenizer.vocab_size)
        self.identity: Identity = identity_of(options, paths, tokenizer)
        self.journal = Journal(next(iter(prefixes.values())))

    def run(self) -> None:
        """Write the outputs, from where an interrupted run was if the options say so."""
        if self.journal.state is not None and not self.options.resume:
            raise DataError(
                f"{self.journal.path}: an interrupted run left "
                f"{self._documents_done():,} documents of this output. Go on "
                "with it by --resume, or remove this file to start over"
            )
        if self.journal.identity is not None and self.options.resume:
            check_same_run(self.journal.identity, self.identity, self.journal.path)
            self.journal.check_outputs(self.prefixes.values())
            self._check_skipped()
        if self.options.resume and self._is_complete():
            print("--resume: nothing is left to do", file=sys.stderr)
            return
        if self.journal.state is None:
            remove_leftovers(self.prefixes, self.journal)
            self.journal.begin(self.identity)
        else:
            self.journal.go_on()
            print(f"--resume: going on after {self._documents_done():,} documents", file=sys.stderr)
        try:
            self._encode_all(fast=not self.options.no_gigatoken)
        except TokenMismatch as mismatch:
            if STANDARD_INPUT in self.paths:
                raise DataError(
                    f"{mismatch}. Standard input cannot be read again: start over with "
                    "--no-gigatoken"
                ) from mismatch
            print(f"{mismatch}; starting over without gigatoken", file=sys.stderr)
            self.journal.begin(self.identity)
            self._encode_all(fast=False)

    def _documents_done(self) -> int:
        assert self.journal.state is not None
        return next(iter(self.journal.state.extents.values())).num_documents

    def _is_complete(self) -> bool:
        if self.journal.manifests is not None:
            finish_publishing(self.journal)
            return True
        if self.journal.state is not None or STANDARD_INPUT in self.paths:
            return False
        manifests = [read_manifest(prefix) for prefix in self.prefixes.values()]
        return all(
            manifest is not None
            and manifest.get("run") == identity_hash(self.identity)
            and not self._would_skip_others(manifest)
            for manifest in manifests
        ) and all(map(_is_whole, self.prefixes.values()))

    def _check_skipped(self) -> None:
        """That no line is missing which these options would have."""
        state = self.journal.state
        if state is not None and state.num_skipped and self.options.on_error == "stop":
            raise DataError(
                f"--resume: the interrupted run has skipped {state.num_skipped:,} bad lines, and "
                "--on-error is stop now. Give --on-error skip, or remove "
                f"{self.journal.path} to start over"
            )

    def _would_skip_others(self, manifest: dict) -> bool:
        """Whether a complete output lacks lines that these options would have, or stop at."""
        limit = self.options.max_document_bytes
        return bool(manifest.get("skipped_lines")) and (
            self.options.on_error == "stop" or manifest.get("max_document_bytes", limit) != limit
        )

    def _encode_all(self, *, fast: bool) -> None:
        outputs = Outputs(self.prefixes, self.dtype, self.journal)
        try:
            self._write_blocks(outputs, fast=fast)
        except TokenMismatch:
            outputs.abandon()
            raise
        except BaseException:
            if outputs.abandon():
                print(
                    f"{outputs.num_documents():,} documents are kept: the same command with "
                    "--resume goes on from there",
                    file=sys.stderr,
                )
            raise

    def _write_blocks(self, outputs: Outputs, *, fast: bool) -> None:
        start = outputs.state
        sizes = [size_of(path) for path in self.paths]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        before = [sum(size or 0 for size in sizes[:i]) for i in range(len(sizes))]
        progress = Progress(total, self.options.log_interval)
        if start.position.offset:
            progress.begin_at(before[start.position.source] + start.position.bytes_read)
        skipped = SkippedLines(self.options.on_error, start.num_skipped)
        limit = RecordLimit(
            max_bytes=self.options.max_document_bytes, skips=self.options.on_error == "skip"
        )
        blocks = read_blocks(self.paths, self.options.json_keys, start.position, limit=limit)
        encode, blocks = self._choose_encoder(blocks, fast=fast)
        encoder = DocumentEncoder(
            keys=self.options.json_keys,
            encode=encode,
            eod=self.tokenizer.eod if self.options.append_eod else None,
            vocab_size=self.tokenizer.vocab_size,
            dtype=self.dtype,
        )
        results = ordered_map(encoder, blocks, self.options.workers)
        with contextlib.closing(results):
            for block in results:
                skipped.report(self.paths[block.end.source], block)
                outputs.add(block)
                progress.update(
                    num_documents=block.num_documents,
                    num_bytes=block.num_bytes,
                    num_tokens=sum(tokens.size for tokens in block.tokens.values()),
                    bytes_read=before[block.end.source] + block.end.bytes_read,
                )
        if outputs.num_documents() == 0:
            raise DataError(f"--input {' '.join(self.paths)}: no documents. Each line must be one")
        outputs.publish(
            manifests_of(
                options=self.options,
                paths=self.paths,
                prefixes=self.prefixes,
                tokenizer=self.tokenizer,
                identity=self.identity,
                dtype=self.dtype.name,
                state=outputs.state,
            )
        )
        progress.finish("all done")
        skipped.finish()

    def _choose_encoder(
        self, blocks: Iterator[Block], *, fast: bool
    ) -> tuple[BatchEncoder, Iterator[Block]]:
        """The fastest encoder that agrees with the tokenizer on the first block; all blocks."""
        slow = list_encoder(self.tokenizer.encode)
        if not fast or self.tokenizer.definition is None:
            return slow, blocks
        first = list(itertools.islice(blocks, 1))
        blocks = itertools.chain(first, blocks)
        texts = [
            text
            for block in first
            for of_key in read_documents(block, self.options.json_keys).texts.values()
            for text in of_key[:: max(1, len(of_key) // _NUM_COMPARED)]
        ]
        try:
            return FastEncoder(self.tokenizer, texts), blocks
        except TokenMismatch as mismatch:
            print(f"{mismatch}; encoding without gigatoken", file=sys.stderr)
            return slow, blocks


def _is_whole(prefix: str) -> bool:
    try:
        check_indexed_dataset(prefix)
    except DataError:
        return False
    return True
