"""Is what was written the same model: bit by bit, and by its logits."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megatron_memory.conversion.evaluate import hf_logits, megatron_logits, state_logits
from megatron_memory.conversion.hf import read_hf_back
from megatron_memory.conversion.hf_stored import same_bits
from megatron_memory.conversion.lingua import read_lingua_back
from megatron_memory.conversion.megatron import read_megatron
from megatron_memory.conversion.options import Format
from megatron_memory.conversion.saved_state import SavedState, Tensors
from megatron_memory.exceptions import CheckpointError

_NUM_TOKENS = 48
_SEED = 20241212


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsReport:
    """How the two models' logits in fp32 differ on fixed random tokens."""

    largest_difference: float
    largest_logit: float
    num_tokens: int
    num_agreeing: int
    """Tokens after which both find the same next token likeliest."""

    @property
    def relative(self) -> float:
        """The largest difference as a part of the largest logit, or of 1."""
        return self.largest_difference / max(1.0, self.largest_logit)

    def __str__(self) -> str:
        return (
            f"logits in fp32: largest difference {self.largest_difference:.3g} (logits up to "
            f"{self.largest_logit:.3g}), top-1 agreement {self.num_agreeing} of {self.num_tokens}"
        )


def check_twins(state: SavedState) -> None:
    """That what a format keeps more than once is the same everywhere.

    Raises:
        CheckpointError: names a tensor that is not.
    """
    for name, one, another in state.twins:
        if not same_bits(one, another):
            raise CheckpointError(
                f"{name} is a copy of a shared table, and is not equal to it: the checkpoint is "
                "damaged, or its layers do not share the table"
            )


def check_read_back(state: SavedState, target: Format, save: Path, dtype: torch.dtype) -> int:
    """Read the result and compare every bit with what it was made of.

    Args:
        state: what was written.
        target: its format.
        save: its folder.
        dtype: of the weights there.

    Returns:
        the number of tensors compared.

    Raises:
        CheckpointError: names tensors that are missing, left over or different.
    """
    moments: dict[str, Tensors] = {}
    usage: Tensors = {}
    if target == "hf":
        weights = read_hf_back(save, state.config)
    elif target == "lingua":
        weights, moments = read_lingua_back(save, state.config)
    else:
        back = read_megatron(save)
        weights, moments, usage = back.weights, back.moments, back.usage
    expected = {name: tensor.to(dtype) for name, tensor in state.exact_weights.items()}
    count = _compare("weights", expected, weights)
    count += _compare("counts of slots read", state.usage, usage)
    for kind in moments.keys() | (state.moments.keys() if target != "hf" else set()):
        count += _compare(kind, state.moments.get(kind, {}), moments.get(kind, {}))
    return count


def _compare(what: str, expected: Tensors, found: Tensors) -> int:
    differing = sorted(expected.keys() ^ found.keys())
    differing += [n for n in expected.keys() & found.keys() if not same_bits(expected[n], found[n])]
    if differing:
        more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise CheckpointError(
            f"--verify: {what} that are not what was converted: {', '.join(differing[:8])}{more}"
        )
    return len(expected)


def compare_logits(
    state: SavedState, source: Format, load: Path, target: Format, save: Path, dtype: torch.dtype
) -> LogitsReport:
    """Run the source's model, its weights rounded to `dtype`, and the target's; both in fp32.

    Each is read by the program that its format belongs to: ours, or transformers. The reference's
    program is not run: its format stands for our model with the tensors that it names.
    """
    length = min(_NUM_TOKENS, state.config.model.max_position_embeddings)
    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(0, state.vocab_size, (2, length), generator=generator)
    one = _logits_of(source, load, state, dtype)(tokens)
    return logits_report(one, _logits_of(target, save, None, dtype)(tokens))


def logits_report(one: Tensor, another: Tensor) -> LogitsReport:
    """Two models' logits on the same tokens, [..., vocabulary] each."""
    return LogitsReport(
        largest_difference=(one - another).abs().max().item(),
        largest_logit=one.abs().max().item(),
        num_tokens=one[..., 0].numel(),
        num_agreeing=int((one.argmax(-1) == another.argmax(-1)).sum()),
    )


def _logits_of(
    format_name: Format, path: Path, state: SavedState | None, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    if format_name == "hf":
        return lambda tokens: hf_logits(path, dtype, tokens)
    if state is not None:
        return lambda tokens: state_logits(state, dtype, tokens)
    if format_name == "megatron":
        return lambda tokens: megatron_logits(path, tokens)
    from megatron_memory.conversion.lingua import read_lingua

    return lambda tokens: state_logits(read_lingua(path), dtype, tokens)
