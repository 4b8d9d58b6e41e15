"""Who is to blame, from what all ranks have told."""

import dataclasses

from megatron_memory.training.ranks.beat import ENDED, LOST, RUNNING, Beat, whereabouts
from megatron_memory.training.ranks.verdict import View, find_culprits

TIMEOUT = 100.0
BEAT = Beat(
    number=7,
    progress=40,
    phase="training",
    iteration=5,
    state=RUNNING,
    error="",
    waits=True,
    at="step.py:1 in f",
    host="node-a",
    machine="m",
    pid=1,
    started="2",
)


def _view(silent: float = 0.0, still: float = 0.0, dead: bool = False, **beat) -> View:
    told = dataclasses.replace(BEAT, **beat)
    return View(beat=told, silent_for=silent, still_for=still, is_dead=dead)


def _culprits(*views: View) -> list[int]:
    return sorted(find_culprits(dict(enumerate(views)), TIMEOUT))


def test_nobody_while_anybody_moves_or_is_within_its_phase():
    still = _view(still=1400)
    assert _culprits(still, _view(still=99)) == []
    for phase in ("starting", "saving"):
        assert _culprits(still, _view(still=1400, phase=phase, waits=False)) == []
        assert _culprits(_view(still=1501), _view(still=1501, phase=phase, waits=False)) == [1]
    assert _culprits(_view(), View(beat=None, silent_for=1400, still_for=1400, is_dead=False)) == []


def test_the_one_that_waits_for_nobody_or_is_furthest_back_hangs():
    still = _view(still=101)
    assert _culprits(still, _view(still=101, waits=False), still) == [1]
    assert _culprits(still, _view(still=101, progress=39), still) == [1]
    evaluating = _view(still=101, waits=False, phase="evaluating")
    assert _culprits(still, evaluating) == [1]


def test_silence_death_and_an_end_of_its_own():
    assert _culprits(_view(), _view(silent=99)) == []
    assert _culprits(_view(), _view(silent=101)) == [1]
    assert _culprits(_view(), _view(silent=1400, phase="saving")) == []
    # Its last word is from before the first step, which another rank knows to be done.
    starting = _view(silent=101, phase="starting")
    assert _culprits(_view(), starting) == [1]
    assert _culprits(_view(phase="starting"), starting) == []
    assert _culprits(_view(), _view(dead=True)) == [1]
    assert _culprits(_view(), _view(state=ENDED, error="ValueError: x", silent=9)) == []
    assert _culprits(_view(), _view(state=ENDED, error="ValueError: x", silent=11)) == [1]
    ended = _view(state=ENDED, silent=1e6, dead=True)
    assert _culprits(ended, ended) == []


def test_ranks_that_lost_another_do_not_blame_themselves():
    lost = _view(state=LOST, error="Connection closed by peer", waits=False)
    assert _culprits(lost, _view(silent=11, phase="saving"), lost) == [1]
    assert _culprits(lost, _view(silent=9), lost) == []
    assert _culprits(_view(still=101), _view(still=101, state=LOST)) == [1]
    gone = _view(state=LOST, still=101)
    assert _culprits(gone, _view(still=101, waits=False, phase="starting"), gone) == [1]


def test_whereabouts_name_this_line():
    import threading

    waits, at = whereabouts(threading.get_ident(), 0)
    assert not waits
    assert "whereabouts" in at
