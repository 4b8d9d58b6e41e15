"""The command line of the generation: flags made from the fields of `options`."""

import dataclasses
from collections.abc import Sequence

from megatron_memory.config.command import parse_command
from megatron_memory.exceptions import ConfigurationError
from megatron_memory.inference.options import ModelSource, Prompts, Sampling

_USAGE = "python -m megatron_memory.generate --load DIR --prompt TEXT [--flags]"
_EPILOG = """\
With N processes: torchrun --nproc-per-node N -m megatron_memory.generate \
--tensor-model-parallel-size N ...
The model's shape, precision and tokenizer come from the checkpoint's config.yaml. A prompt that
begins with a dash follows an equals sign: --prompt=-5. Flags may be written with underscores, too.
"""

_LARGEST_FILE = 64 * 2**20
"""Bytes of prompts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Continue prompts with a model that megatron_memory.train has saved."""

    source: ModelSource
    """Model"""
    prompts: Prompts
    """Prompts"""
    sampling: Sampling
    """Choice of tokens"""


def parse_request(argv: Sequence[str]) -> Request:
    """Read a command line; `--help` prints and exits.

    Raises:
        ConfigurationError: an unknown flag, or a value that cannot be.
    """
    return parse_command(Request, argv, usage=_USAGE, epilog=_EPILOG)


def read_prompts(prompts: Prompts) -> list[str]:
    """All prompts, those of the command line first.

    Raises:
        ConfigurationError: there is none, one is empty, or the file cannot be read.
    """
    texts = list(prompts.prompt)
    if "" in texts:
        raise ConfigurationError('--prompt "" is empty: give at least one character to continue.')
    if prompts.prompts_file is not None:
        texts += _lines(prompts.prompts_file)
    if not texts:
        raise ConfigurationError("--prompt is missing: give a text to continue, or --prompts-file.")
    return texts


def _lines(path: str) -> list[str]:
    try:
        # It may be a pipe, as of a shell's <(...).
        with open(path, "rb") as stream:
            content = stream.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ConfigurationError(
                f"--prompts-file {path} has more than {_LARGEST_FILE} bytes. Give fewer prompts."
            )
        # Editors of Windows put a mark before a text, which a tokenizer would take for a word.
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigurationError(
            f"--prompts-file {path} cannot be read: {error.strerror}. Check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"--prompts-file {path} is not UTF-8 text: {error}. Convert it."
        ) from error
    if not text:
        raise ConfigurationError(f"--prompts-file {path} is empty. Write one prompt a line.")
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ConfigurationError(
                f"--prompts-file {path}: line {number} is empty. Each line is a prompt: remove it."
            )
    return lines
