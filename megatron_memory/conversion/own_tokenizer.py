"""The tokenizer that came with a model, built as a training builds it."""

from collections.abc import Callable
from typing import Any

from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.data.tokenizer_hash import TOKENIZER_HASH, hash_of
from megatron_memory.data.tokenizers import build_tokenizer, num_ids
from megatron_memory.exceptions import CheckpointError, ConfigurationError, DataError


def count_ids(state: SavedState) -> int:
    """Ids that the model's tokenizer may give; 0 without one.

    Raises:
        CheckpointError: what the configuration names is no tokenizer.
    """
    return 0 if state.tokenizer is None else num_ids(_built(state))


def check_is_the_trainings(
    state: SavedState, *, is_given: bool, notify: Callable[[str], None]
) -> None:
    """That the tokenizer at hand is the one that the model was trained with, where that is known.

    Args:
        state: the model.
        is_given: the user names the tokenizer for this conversion.
        notify: is told of a difference that the user may want.

    Raises:
        CheckpointError: it has changed since.
    """
    expected = state.common.get(TOKENIZER_HASH)
    if expected is None or state.tokenizer is None or hash_of(_built(state)) == expected:
        return
    if not is_given:
        raise CheckpointError(
            f"{state.tokenizer} is not the tokenizer that the model was trained with: it has "
            "changed since. Name a copy of the training's with --tokenizer-model, or this one, if "
            "you want it all the same"
        )
    notify(f"note: {state.tokenizer} is not the tokenizer that the model was trained with")


def _built(state: SavedState) -> Any:
    assert state.tokenizer is not None, "the caller asks first"
    data = state.config.data
    kind = data.tokenizer_type or "HuggingFaceTokenizer"
    if state.tokenizer.is_dir():
        kind = "HuggingFaceTokenizer"
    size = data.vocab_size if kind == "TikTokenizer" else None
    try:
        return build_tokenizer(kind, str(state.tokenizer), vocab_size=size)
    except (ConfigurationError, DataError) as error:
        raise CheckpointError(f"the checkpoint's tokenizer cannot be copied: {error}") from error
