"""The model before and after its growth, run on the same tokens in fp32."""

import dataclasses
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_memory.conversion.evaluate import state_logits
from megatron_memory.conversion.growth.half_keys import are_new
from megatron_memory.conversion.growth.options import Checking
from megatron_memory.conversion.growth.tensors import table_names
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.conversion.verify import LogitsReport, logits_report
from megatron_memory.data.index_files import check_indexed_dataset
from megatron_memory.exceptions import ConfigurationError, DataError
from megatron_memory.memory.routing import Route

_SEED = 20241212


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewReads:
    """How much is read from rows that the smaller model did not have."""

    share_of_reads: float
    """Reads of new rows, of all."""
    share_of_weight: float
    """The softmax's weight on new rows, of all: the mean over tokens, layers and heads."""
    largest_weight: float
    """The most of that for a token's head: m of `half_keys`."""
    largest_row: float
    """Largest norm of a table's row: V of `half_keys`; with peer, of a row v."""

    def __str__(self) -> str:
        bound = 2 * self.largest_weight * self.largest_row
        return (
            f"new rows: {self.share_of_reads:.2%} of the reads, {self.share_of_weight:.2%} of the "
            f"weight; a head's at most {self.largest_weight:.2%}, so that its sum of rows changes "
            f"by at most {bound:.3g} (2 x that x the largest row, {self.largest_row:.3g})"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """What the probe saw."""

    logits: LogitsReport
    losses: tuple[float, float] | None
    """Mean cross entropy before and after, in nats a token; None for random tokens."""
    new_reads: NewReads | None
    """Where a head reads as many rows as before, and new ones among them."""

    def lines(self) -> Iterator[str]:
        """For the user."""
        yield str(self.logits)
        if self.losses is not None:
            before, after = self.losses
            yield f"loss on {self.logits.num_tokens} tokens: {before:.4f} before, {after:.4f} after"
        if self.new_reads is not None:
            yield str(self.new_reads)


def probe(before: SavedState, after: SavedState, checking: Checking) -> Change:
    """Run both models.

    Args:
        before: the smaller one.
        after: the larger one.
        checking: which tokens.

    Raises:
        ConfigurationError, DataError: `--probe-data` cannot be read, or has too few tokens.
    """
    tokens = _tokens(before, checking)
    routes: list[Route] = []
    one = state_logits(before, torch.float32, tokens)
    another = state_logits(
        after, torch.float32, tokens, on_route=lambda _, route: routes.append(route)
    )
    has_losses = checking.probe_data is not None
    return Change(
        logits=logits_report(one, another),
        losses=(_loss(one, tokens), _loss(another, tokens)) if has_losses else None,
        new_reads=_new_reads(before, after, routes),
    )


def _tokens(state: SavedState, checking: Checking) -> Tensor:
    """[sequences, length]."""
    length = min(checking.probe_length, state.config.model.max_position_embeddings)
    shape = (checking.probe_sequences, length)
    if checking.probe_data is None:
        generator = torch.Generator().manual_seed(_SEED)
        return torch.randint(0, state.vocab_size, shape, generator=generator)
    try:
        summary = check_indexed_dataset(checking.probe_data)
    except DataError as error:
        raise DataError(f"--probe-data {checking.probe_data}: {error}") from error
    wanted = shape[0] * shape[1]
    if summary.num_tokens < wanted:
        raise ConfigurationError(
            f"--probe-data {checking.probe_data} has {summary.num_tokens} tokens, and {wanted} are "
            "wanted: lower --probe-sequences or --probe-length."
        )
    dataset, found = IndexedDataset(checking.probe_data), []
    for i in range(len(dataset)):
        found.append(torch.from_numpy(dataset[i].astype("int64")))
        if sum(map(len, found)) >= wanted:
            break
    tokens = torch.cat(found)[:wanted].view(shape)
    if tokens.max() >= state.vocab_size:
        raise ConfigurationError(
            f"--probe-data {checking.probe_data} has the token {tokens.max()}, and the model's "
            f"vocabulary {state.vocab_size}: give data of the model's tokenizer."
        )
    return tokens


def _loss(logits: Tensor, tokens: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def _new_reads(before: SavedState, after: SavedState, routes: list[Route]) -> NewReads | None:
    old, new = before.config.memory.num_half_keys, after.config.memory.num_half_keys
    is_exact = before.config.memory.top_k != after.config.memory.top_k
    if not before.config.memory.enabled or old == new or is_exact:
        return None
    is_new = [are_new(route.indices, old, new // old) for route in routes]
    weights = torch.stack([(r.weights * of).sum(-1) for r, of in zip(routes, is_new, strict=True)])
    return NewReads(
        share_of_reads=torch.stack(is_new).float().mean().item(),
        share_of_weight=weights.mean().item(),
        largest_weight=weights.max().item(),
        largest_row=max(_largest_row(after, name) for name in _summed_tables(after)),
    )


def _summed_tables(state: SavedState) -> list[str]:
    is_peer = state.config.memory.variant == "peer"
    return [name for name, _, number in table_names(state.config) if not is_peer or number == 1]


def _largest_row(state: SavedState, name: str) -> float:
    table = state.exact_weights[name]
    norms = (table.read_rows(*block).float().norm(dim=1).max() for block in table.blocks())
    return max(norm.item() for norm in norms)
