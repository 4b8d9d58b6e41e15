"""Reads, tokenizes and writes, in the order of the input."""

import contextlib
import functools
import os

from megatron_memory.data.preprocess.encoding import DocumentEncoder
from megatron_memory.data.preprocess.options import PreprocessOptions
from megatron_memory.data.preprocess.outputs import IndexedOutput
from megatron_memory.data.preprocess.progress import Progress
from megatron_memory.data.preprocess.sources import expand_inputs, read_batches
from megatron_memory.data.preprocess.workers import ordered_map
from megatron_memory.exceptions import DataError


def preprocess(options: PreprocessOptions) -> list[str]:
    """Tokenize JSONL files into `.bin`/`.idx` pairs, byte for byte as Megatron-LM's own tool.

    Returns:
        The prefixes written, one for each key: what `--data-path` takes.

    Raises:
        ConfigurationError: flags that do not fit together.
        DataError: an input or the tokenizer cannot be read, or a line is bad; nothing is left
            under the outputs' names.
        WorkerError: a worker process died.
    """
    paths = expand_inputs(options.input)
    # The tokenizers library warns, and may deadlock, when it forks with threads of its own.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    encoder = DocumentEncoder(options)
    make_encoder = functools.partial(DocumentEncoder, options)
    progress = Progress(sum(map(os.path.getsize, paths)), options.log_interval)
    with contextlib.ExitStack() as stack:
        outputs = {}
        for key in options.json_keys:
            outputs[key] = IndexedOutput(f"{options.output_prefix}_{key}_document", encoder.dtype)
            stack.callback(outputs[key].discard)
        batches = stack.enter_context(
            contextlib.closing(ordered_map(make_encoder, read_batches(paths), options.workers))
        )
        for batch in batches:
            for key, output in outputs.items():
                output.add(batch.tokens[key], batch.lengths[key])
            progress.update(batch.num_documents, batch.num_bytes, batch.bytes_read)
        if progress.num_documents == 0:
            raise DataError(f"--input {' '.join(paths)}: no documents. Each line must be one")
        for output in outputs.values():
            output.finish()
        for output in outputs.values():
            output.publish()
    progress.finish("all done")
    return [output.prefix for output in outputs.values()]
