"""Training data and the tokenizer."""

from dataclasses import dataclass

from megatron_memory.config.option import derived, fill_derived, option

DEFAULT_SPLIT = "969, 30, 1"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Tokenised datasets (`.bin` and `.idx` pairs) and the tokenizer they were made with."""

    data_path: tuple[str, ...] = ()
    """Prefixes of the datasets, each optionally preceded by its weight: 0.3 a 0.7 b."""
    train_data_path: tuple[str, ...] = ()
    """Datasets for training only, instead of --data-path and --split."""
    valid_data_path: tuple[str, ...] = ()
    """Datasets for validation only, with --train-data-path."""
    test_data_path: tuple[str, ...] = ()
    """Datasets for the final test only, with --train-data-path."""
    split: str | None = derived(f'"{DEFAULT_SPLIT}" with --data-path')
    """Parts of --data-path for training, validation and test, in proportion to these numbers."""
    data_cache_path: str | None = option(None, may_differ=True)
    """Directory for the index of shuffled samples. None: beside the data."""
    tokenizer_type: str | None = None
    """HuggingFaceTokenizer, or another of the types that tools/preprocess_data.py knows."""
    tokenizer_model: str | None = None
    """Folder, file or name of the tokenizer."""
    vocab_size: int | None = option(None, at_least=1)
    """Number of tokens before padding. Without it: the tokenizer's."""
    make_vocab_size_divisible_by: int = option(128, at_least=1)
    """The vocabulary is padded to a multiple of this times the tensor-parallel size."""
    num_workers: int = option(2, at_least=0, may_differ=True)
    """Processes that read data for each rank; 0: the training process reads."""
    reset_position_ids: bool = False
    """Count positions from 0 again after each end of document."""
    reset_attention_mask: bool = False
    """Keep attention within a document."""
    eod_mask_loss: bool = False
    """No loss for predicting what follows an end of document."""

    def __post_init__(self) -> None:
        if self.data_path:
            fill_derived(self, split=DEFAULT_SPLIT)
