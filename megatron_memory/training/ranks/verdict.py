"""Which rank is to blame when a run does not go on, from what all ranks have told."""

import dataclasses
from collections.abc import Mapping

from megatron_memory.training.ranks.beat import ENDED, LOST, RUNNING, Beat

ALLOWANCES = {
    "starting": 15.0,
    "saving": 15.0,
    "rewinding": 15.0,
    "evaluating": 1.0,
    "training": 1.0,
}
"""Phases, and how many times --rank-timeout one may take without progress. The first step is of
`starting`: kernels are compiled, and libraries find their connections."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """What one rank knows of another."""

    beat: Beat | None
    """The newest; None: there was none yet."""
    silent_for: float
    """Seconds since there was a new one."""
    still_for: float
    """Seconds since there was progress."""
    is_dead: bool
    """Whether its process is known to have ended: it is on this machine."""


def find_culprits(views: Mapping[int, View], timeout: float) -> dict[int, str]:
    """The ranks to blame and why; {} while the run may go on.

    Args:
        views: of all ranks, by their numbers.
        timeout: seconds, --rank-timeout.
    """
    beats = {rank: view.beat for rank, view in views.items() if view.beat is not None}
    if all(beat.state == ENDED for beat in beats.values()):
        return {}
    culprits = {
        rank: reason
        for rank, view in views.items()
        if (reason := _reason(view, timeout, beats)) is not None
    }
    return culprits or _without_progress(views, beats, timeout)


def _is_anyone_lost(beats: Mapping[int, Beat]) -> bool:
    return any(beat.state == LOST for beat in beats.values())


def _reason(view: View, timeout: float, beats: Mapping[int, Beat]) -> str | None:
    beat, soon = view.beat, min(10.0, timeout / 4)
    if beat is None:
        return "has not begun" if view.silent_for > ALLOWANCES["starting"] * timeout else None
    if beat.state == ENDED:
        # The others come to the same end in a moment, if it is a common one.
        if view.silent_for <= soon:
            return None
        return f"has ended: {beat.error}" if beat.error else "has ended before the others"
    if view.is_dead:
        return f"is dead: process {beat.pid} has ended without a word"
    # Who was last heard of before the first step, which another one knows to be done, took part.
    has_begun = any(other.phase != "starting" for other in beats.values())
    phase = "training" if has_begun and beat.phase == "starting" else beat.phase
    allowed = soon if _is_anyone_lost(beats) else ALLOWANCES[phase] * timeout
    if view.silent_for > allowed:
        return (
            f"does not answer: nothing was heard of it for {view.silent_for:.0f} s, so that its "
            "process, its machine or the network to it has stopped"
        )
    return None


def _without_progress(
    views: Mapping[int, View], beats: Mapping[int, Beat], timeout: float
) -> dict[int, str]:
    running = {rank: beat for rank, beat in beats.items() if beat.state == RUNNING}
    allowed = max((ALLOWANCES[beat.phase] for beat in running.values()), default=1.0) * timeout
    if _is_anyone_lost(beats):
        allowed = timeout
    still = min(view.still_for for view in views.values())
    if still <= allowed:
        return {}
    not_waiting = {rank: beat for rank, beat in running.items() if not beat.waits}
    if not_waiting:
        why = f"hangs: no rank has made progress for {still:.0f} s, and it waits for no other"
        return dict.fromkeys(not_waiting, why)
    lost = {rank: beat for rank, beat in beats.items() if beat.state == LOST}
    if lost:
        return {rank: f"has lost the others: {beat.error}" for rank, beat in lost.items()}
    behind = min((beat.progress for beat in running.values()), default=0)
    return {
        rank: f"waits for the others, as they do for it, for {still:.0f} s: it is the furthest back"
        for rank, beat in running.items()
        if beat.progress == behind
    }
