"""What a preprocessing run is told; the flags of tools/preprocess_data.py are made from it."""

import dataclasses
from typing import Literal

from megatron_memory.config.option import option
from megatron_memory.exceptions import ConfigurationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """One preprocessing run. Names and meanings are those of Megatron-LM's preprocess_data.py."""

    input: tuple[str, ...]
    """Files of JSON lines (plain, .gz or .zst) or .parquet, folders of them, glob patterns, or -
    for standard input; read in the order given, folders and patterns sorted. Links to files are
    followed, and links to folders where they are named, but not within a folder."""

    output_prefix: str
    """Outputs are OUTPUT_PREFIX_KEY_document.bin and .idx, for each of --json-keys."""

    json_keys: tuple[str, ...] = ("text",)
    """Fields of each JSON object to tokenize, each into its own pair of files."""

    tokenizer_type: str
    """HuggingFaceTokenizer, SentencePieceTokenizer, GPTSentencePieceTokenizer, Llama2Tokenizer,
    TikTokenizer, ByteLevelTokenizer or NullTokenizer."""

    tokenizer_model: str | None = None
    """The tokenizer's folder, file, or name on the Hugging Face hub."""

    vocab_size: int | None = None
    """NullTokenizer: its number of ids. TikTokenizer: entries to keep."""

    tokenizer_hf_include_special_tokens: bool = False
    """Add the special tokens that a HuggingFaceTokenizer puts around a text."""

    append_eod: bool = False
    """End every document that is not empty with the tokenizer's end-of-document token."""

    workers: int = option(1, at_least=1)
    """Processes that tokenize. Their number never changes the output."""

    log_interval: int = option(1000, at_least=1)
    """Documents between two lines of progress."""

    on_error: Literal["stop", "skip"] = "stop"
    """A bad line stops the run (stop), or is omitted, counted and reported (skip)."""

    max_document_bytes: int = option(16 * 2**20, at_least=1)
    """Longest line of JSON, or texts of a row, to read; a longer one is a bad line. A process needs
    up to 25 times as much memory for it, and without gigatoken up to 200 times."""

    resume: bool = False
    """Go on with the run that was interrupted with the same flags; without one, begin."""

    no_gigatoken: bool = False
    """Do not use gigatoken, which encodes many times faster than the tokenizer's own library."""

    def __post_init__(self) -> None:
        for flag, values in (("--input", self.input), ("--json-keys", self.json_keys)):
            if not values:
                raise ConfigurationError(f"{flag}: give at least one")
        for key in self.json_keys:
            if self.json_keys.count(key) > 1:
                raise ConfigurationError(f"--json-keys: {key} is given twice; name each key once")
