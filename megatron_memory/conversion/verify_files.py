"""Is what lies beside the weights the same: the tokenizer, and how the model is to generate.

Cheap whatever the model's size, so that it is done for large models too.
"""

from collections.abc import Iterator
from pathlib import Path

from megatron_memory.conversion.generation_settings import check_same_generation
from megatron_memory.conversion.hf import read_config
from megatron_memory.conversion.hf_memory import register
from megatron_memory.conversion.megatron import TOKENIZER, read_generation_back
from megatron_memory.conversion.options import Format
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.conversion.tokenizer_check import check_same_tokenizer
from megatron_memory.conversion.tokenizer_files import tokenizer_files
from megatron_memory.exceptions import CheckpointError


def check_files(state: SavedState, target: Format, save: Path) -> Iterator[str]:
    """Compare the files that were written with those that they were made of.

    Args:
        state: what was written.
        target: its format.
        save: its folder.

    Yields:
        what was found to be the same.

    Raises:
        CheckpointError: names the difference.
    """
    if target == "lingua":
        return
    if state.tokenizer is not None:
        register()
        folder = save if target == "hf" else save / TOKENIZER
        compared = check_same_tokenizer(
            state.tokenizer, folder, state.config.data.tokenizer_type or "HuggingFaceTokenizer"
        )
        # transformers cannot read every file of another program, and then an export has none.
        must_be_there = target == "megatron" or tokenizer_files(state.tokenizer)
        if compared is None and must_be_there:
            raise CheckpointError(f"--verify: {folder} lacks a copy of {state.tokenizer}")
        if compared is not None:
            yield f"the tokenizer: {compared}"
    if state.generation is None:
        return
    if target == "hf":
        count = check_same_generation(state.generation, save, read_config(save))
        yield f"{count} generation settings"
    elif read_generation_back(save) != state.generation:
        raise CheckpointError(f"--verify: {save} has other generation settings than the original")
    else:
        yield "the generation settings"
