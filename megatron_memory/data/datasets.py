"""Training, validation and test samples from `.bin`/`.idx` files, on megatron-core's datasets."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tokenizers.base_tokenizer import MegatronTokenizerBase

from megatron_memory.data.blend import DataSources, data_sources
from megatron_memory.data.cached_datasets import (
    TokenDataset,
    TokenDatasetBuilder,
    TokenDatasetConfig,
)
from megatron_memory.data.index_files import check_indexed_dataset, index_fingerprint
from megatron_memory.data.indexed.manifest import tokenizer_warning
from megatron_memory.data.node_order import node_leaders_first, on_node_leaders
from megatron_memory.data.plan import plan_splits
from megatron_memory.data.tokenizer_hash import hash_of
from megatron_memory.data.tokenizers import end_of_document
from megatron_memory.exceptions import DataError

Samples = torch.utils.data.Dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Datasets:
    """The samples of a run, in the order in which they are read.

    A sample is a dict of tensors: `tokens`, `labels`, `position_ids` [seq_length] int64 and
    `loss_mask` [seq_length] float32; with --reset-attention-mask also `attention_mask`
    [1, seq_length, seq_length] bool, True where attention is forbidden.
    """

    train: Samples | None
    valid: Samples | None
    """None where the split has no data or no sample of it is needed."""
    test: Samples | None
    """None as for `valid`."""
    summary: tuple[str, ...]
    """What the files hold, how far each split goes, and warnings, a line each; only on each node's
    first rank, empty on the others."""


def build_datasets(
    *,
    tokenizer: MegatronTokenizerBase,
    padded_vocab_size: int,
    seq_length: int,
    num_train_samples: int,
    num_valid_samples: int,
    num_test_samples: int,
    seed: int,
    data_path: Sequence[str] = (),
    split: str | None = None,
    train_data_path: Sequence[str] = (),
    valid_data_path: Sequence[str] = (),
    test_data_path: Sequence[str] = (),
    data_cache_path: str | None = None,
    reset_position_ids: bool = False,
    reset_attention_mask: bool = False,
    eod_mask_loss: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Datasets:
    """Build the datasets of a run. Every rank of `group` must call it.

    Samples are those of Megatron-LM, in its order, for the same seed and flags. The index of the
    samples is built once for each node and cached. A single dataset, or several with weights, is
    repeated as often as the number of samples asks for, newly shuffled each time; their order
    depends on that number only through the number of passes.

    No attention mask is made without `reset_attention_mask`: causal attention makes its own.

    Args:
        tokenizer: gives the end-of-document id.
        padded_vocab_size: entries of the embedding; a sample with a larger id is refused.
        seq_length: tokens of a sample.
        num_train_samples, num_valid_samples, num_test_samples: that the whole run reads; 0 for a
            split that it does not read.
        seed: of the shuffling.
        data_path ... eod_mask_loss: Megatron's flags of these names.
        data_cache_path: None caches beside the data.
        group: the ranks that build; None for all.

    Raises:
        ConfigurationError: flags that do not fit together.
        DataError: a file is missing or damaged, or a split gives too few samples. Raised on every
            rank alike.
    """
    sources = data_sources(
        data_path=data_path,
        split=split,
        train_data_path=train_data_path,
        valid_data_path=valid_data_path,
        test_data_path=test_data_path,
    )
    num_samples = (num_train_samples, num_valid_samples, num_test_samples)
    if reset_position_ids or reset_attention_mask or eod_mask_loss:
        # All three look for the end of a document; without one they would do nothing.
        end_of_document(tokenizer)

    def check() -> tuple[str, ...]:
        return _check_files(sources, tokenizer, seq_length, num_samples)

    def build() -> Datasets:
        config = _dataset_config(
            sources,
            random_seed=seed,
            sequence_length=seq_length,
            path_to_cache=os.path.abspath(data_cache_path) if data_cache_path else None,
            tokenizer=tokenizer,
            reset_position_ids=reset_position_ids,
            reset_attention_mask=reset_attention_mask,
            eod_mask_loss=eod_mask_loss,
            create_attention_mask=reset_attention_mask,
            padded_vocab_size=padded_vocab_size,
            fingerprints={prefix: index_fingerprint(prefix) for prefix in sources.prefixes()},
        )
        return _build_splits(config, num_samples, summary)

    summary = on_node_leaders(check, group) or ()
    return node_leaders_first(build, group)


def _check_files(
    sources: DataSources,
    tokenizer: MegatronTokenizerBase,
    seq_length: int,
    num_samples: tuple[int, int, int],
) -> tuple[str, ...]:
    """What the files hold, how far each split goes, and warnings; a line each."""
    summaries = {prefix: check_indexed_dataset(prefix) for prefix in sources.prefixes()}
    plans = plan_splits(sources, summaries, seq_length=seq_length, num_samples=num_samples)
    warnings = _tokenizer_warnings(sources.prefixes(), tokenizer)
    return (*map(str, summaries.values()), *map(str, plans), *warnings)


def _tokenizer_warnings(prefixes: Iterable[str], tokenizer: MegatronTokenizerBase) -> list[str]:
    if tokenizer.library == "null":
        return []  # Plain numbers, in place of a tokenizer that the run does not need.
    found = hash_of(tokenizer)
    warnings = (tokenizer_warning(prefix, found) for prefix in prefixes)
    return [warning for warning in warnings if warning is not None]


def _dataset_config(sources: DataSources, **options: Any) -> TokenDatasetConfig:
    if sources.shared is not None:
        blend = (sources.shared.prefixes, sources.shared.weights)
        return TokenDatasetConfig(blend=blend, split=sources.split, **options)
    blends = [blend and (blend.prefixes, blend.weights) for blend in sources.per_split]
    return TokenDatasetConfig(blend_per_split=blends, **options)


def _build_splits(
    config: TokenDatasetConfig, num_samples: tuple[int, int, int], summary: tuple[str, ...]
) -> Datasets:
    # A split that is not read must not be built either: for one without documents megatron-core
    # looks for tokens for ever.
    for i, needed in enumerate(num_samples):
        if needed == 0 and config.split_matrix is not None:
            config.split_matrix[i] = None
        if needed == 0 and config.blend_per_split is not None:
            config.blend_per_split[i] = None
    builder = TokenDatasetBuilder(TokenDataset, list(num_samples), lambda: True, config)
    train, valid, test = builder.build()
    for name, dataset, needed in zip(
        ("training", "validation", "test"), (train, valid, test), num_samples, strict=True
    ):
        if dataset is not None and len(dataset) < needed:
            raise DataError(
                f"the {name} data gives {len(dataset)} samples, but {needed} are needed. Use more "
                "data or fewer iterations"
            )
    return Datasets(train=train, valid=valid, test=test, summary=summary)
