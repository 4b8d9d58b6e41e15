"""Copies of weights and optimizer states that several ranks hold: are they the same, bit for bit?

torch's checkpoint takes each tensor from any rank that has a copy. Where copies have drifted apart,
by faulty hardware or a fault in a program, the file is a state that no rank ever had.

| copies | on the ranks of |
|---|---|
| weights | data parallelism; of tables and experts, those with the same columns or experts |
| states, without the distributed optimizer | the same |
| what tensor parallelism does not split, and its states | tensor parallelism |
| `--memory-replicate-pool`, tied embeddings, their states | the pipeline stages that have one |

A distributed optimizer's states are in parts over data-parallel ranks: each part has one copy, but
for those of what tensor or pipeline ranks repeat.
"""

import collections
import dataclasses
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_memory.exceptions import TrainingError
from megatron_memory.optimizer.states import states_by_parameter
from megatron_memory.training.finite import named_parameters
from megatron_memory.training.setup import TrainingSetup, data_parallel_group
from megatron_memory.training.wrapping import tables_of, unwrap

_AT_ONCE = 1 << 20
_MOST_NAMES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Copies:
    """Tensors that the ranks of a group hold alike, in the same order on each."""

    what: str
    """For the user."""
    group: dist.ProcessGroup
    tensors: list[tuple[str, Tensor]]


def check_replicas(setup: TrainingSetup, iteration: int) -> None:
    """That all copies are equal; a collective call of a small gather in each group.

    The ranks must hold whole weights: see `whole_weights`.

    Raises:
        TrainingError: on every rank; it names the ranks that differ from most, and the parameters.
    """
    own: list[str] = []
    for copies in _all_copies(setup):
        own += _differences(copies)
    found: list[list[str]] = [own] * dist.get_world_size()
    dist.all_gather_object(found, own)
    problems = list(dict.fromkeys(problem for problems in found for problem in problems))
    if problems:
        more = len(problems) - _MOST_NAMES
        listed = "; ".join(problems[:_MOST_NAMES]) + (f"; and {more} more" if more > 0 else "")
        raise TrainingError(
            f"iteration {iteration}: copies of weights are not equal: {listed}. Not saved. "
            "Look for faulty hardware on that rank, and go back to the newest checkpoint with "
            "--load"
        )


def _differences(copies: _Copies) -> list[str]:
    """The ranks whose copy is not that of most, where this rank is the group's first."""
    prints = torch.stack([fingerprint(tensor) for _, tensor in copies.tensors])
    gathered = [torch.empty_like(prints) for _ in range(copies.group.size())]
    dist.all_gather(gathered, prints, group=copies.group)
    together = torch.stack(gathered)
    if copies.group.rank() > 0 or bool((together == together[0]).all()):
        return []
    ranks = dist.get_process_group_ranks(copies.group)
    by_ranks: dict[tuple[int, ...], list[str]] = {}
    for (name, _), column in zip(copies.tensors, together.t().tolist(), strict=True):
        (most, number), *others = collections.Counter(column).most_common()
        if others:
            # Of two copies nobody knows which one is right.
            is_even = number == others[0][1]
            odd = [r for r, p in zip(ranks, column, strict=True) if is_even or p != most]
            by_ranks.setdefault(tuple(odd), []).append(name)
    return [
        f"{_ranks(odd, len(ranks))} of the {len(ranks)} {copies.what} differ"
        f"{'s' if len(odd) == 1 else ''} in {_names(names)}"
        for odd, names in by_ranks.items()
    ]


def _ranks(odd: tuple[int, ...], number: int) -> str:
    word = "rank" if len(odd) == 1 else "ranks"
    return f"{word} {', '.join(map(str, odd))}"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """A number of 64 bits that any change of a single element changes, on the tensor's device.

    The sum of each eight bytes times an odd number made of their place, modulo 2^64: sums of
    integers do not depend on their order.
    """
    flat = tensor.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    places = _mixed(torch.arange(min(_AT_ONCE, len(flat)), device=tensor.device))
    numbers = _mixed(torch.arange(1 + len(flat) // _AT_ONCE, device=tensor.device))
    for number, part in enumerate(flat.split(_AT_ONCE)):
        words = _words(part)
        # Another odd number for each part, so that parts cannot change places.
        total += (words * places[: len(words)]).sum() * numbers[number]
    return total


def _words(part: Tensor) -> Tensor:
    """The bytes of a flat tensor, eight in each int64; the last elements in one each."""
    ratio = 8 // part.element_size()
    whole = len(part) // ratio * ratio
    head, tail = part[:whole], part[whole:]
    if head.storage_offset() % ratio:
        # Such a view must begin at a word. Copies on other ranks may, and must give the same.
        head = head.clone()
    words = head.view(torch.int64)
    return words if not len(tail) else torch.cat((words, tail.view(_INTEGERS[8 // ratio]).long()))


def _mixed(numbers: Tensor) -> Tensor:
    """Odd numbers that look drawn: of consecutive ones, small differences would cancel out."""
    mixed = numbers
    for _ in range(2):
        mixed = (mixed + 1) * _ODD
        mixed ^= mixed >> 29
    return mixed | 1


_ODD = 0x1E3779B97F4A7C15
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _all_copies(setup: TrainingSetup) -> Iterator[_Copies]:
    """The groups of this rank, in an order that is the same on all of its members."""
    named = list(named_parameters(setup))
    names = {parameter: name for name, parameter in named}
    weights = {p: [(name, p.data)] for name, p in named}
    states = {p: list[tuple[str, Tensor]]() for _, p in named}
    for parameter, found in states_by_parameter(setup.optimizer, [p for _, p in named]):
        states[parameter] += [(f"{names[parameter]} ({kind})", t) for kind, t in found.items()]
    is_split = setup.config.parallel.use_distributed_optimizer
    replicas = _pipeline_copies(setup)

    def copies(what: str, group: dist.ProcessGroup, parameters, *, with_states: bool):
        tensors = [
            item for p in parameters for item in weights[p] + (states[p] if with_states else [])
        ]
        if group.size() > 1 and tensors:
            yield _Copies(what=what, group=group, tensors=tensors)

    own = [parameter for _, parameter in named]
    dense = [p for p in own if getattr(p, "allreduce", True)]
    expert = [p for p in own if not getattr(p, "allreduce", True)]
    with_states = not is_split
    data = "data-parallel copies"
    yield from copies(data, data_parallel_group(), dense, with_states=with_states)
    # The ranks with the same columns of the tables, or the same experts.
    group = parallel_state.get_expert_data_parallel_group()
    yield from copies(data, group, expert, with_states=with_states)
    repeated = [p for p in dense if not getattr(p, "tensor_model_parallel", False)]
    group = parallel_state.get_tensor_model_parallel_group()
    yield from copies("tensor-parallel copies", group, repeated, with_states=True)
    for group, parameters in replicas:
        yield from copies("pipeline copies", group, parameters, with_states=True)


def _pipeline_copies(
    setup: TrainingSetup,
) -> list[tuple[dist.ProcessGroup, list[torch.nn.Parameter]]]:
    """Parameters that stages of a pipeline repeat, and the ranks that have them."""
    found = []
    for chunk in setup.model:
        found += [(t.replicas, list(t.chunks)) for t in tables_of(chunk) if t.replicas is not None]
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return found
    tied = [
        unwrap(chunk).shared_embedding_or_output_weight()
        for chunk in setup.model
        if unwrap(chunk).share_embeddings_and_output_weights
        and (unwrap(chunk).pre_process or unwrap(chunk).post_process)
    ]
    if tied and parallel_state.is_rank_in_embedding_group():
        found.append((parallel_state.get_embedding_group(), tied[:1]))
    return found
