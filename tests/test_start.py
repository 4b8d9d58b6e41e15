"""Ranks that start alike, and those that do not: every rank gets the same answer."""

import signal
import threading

import pytest
import torch.distributed as dist

from megatron_memory import start
from megatron_memory.entry import exit_code_for_torchrun
from megatron_memory.exceptions import ConfigurationError
from megatron_memory.start import Report, agree, difference, settings_of, start_alike
from tests.config.helpers import parse


def _report(rank: int, host: str = "a", problem: str | None = None, **settings: str) -> Report:
    return Report(rank=rank, host=host, settings=settings, problem=problem)


def _agree_all(reports: list[Report], world_size: int | None = None) -> list[str | None]:
    """What each rank hears, over a store that is used for the first time."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers: list[str | None] = ["no answer"] * len(reports)

    def run(place: int) -> None:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        answers[place] = agree(store, reports[place], world_size or len(reports))

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(reports))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return answers


def test_ranks_that_are_alike_go_on():
    assert _agree_all([_report(rank, lr="1") for rank in range(3)]) == [None] * 3


def test_every_rank_hears_what_differs_and_where():
    reports = [
        _report(0, lr="1", seed="5"),
        _report(1, lr="1", seed="5"),
        _report(2, "b", lr="2", seed="5"),
    ]
    answers = _agree_all(reports)
    assert len(set(answers)) == 1
    assert "- lr: 1 on ranks 0 to 1 (a); 2 on rank 2 (b)\n" in answers[0]
    assert "seed" not in answers[0]


def test_every_rank_hears_of_an_error_before_all_have_arrived(monkeypatch):
    monkeypatch.setattr(start, "_SECONDS_TO_HEAR", 1)
    reports = [_report(0, lr="1"), _report(2, "b", problem="DataError: no such file")]
    expected = "rank 2 on b cannot start: DataError: no such file"
    assert _agree_all(reports, world_size=4) == [expected] * 2


def test_ranks_that_never_arrive_are_named(monkeypatch):
    monkeypatch.setattr(start, "_SECONDS_TO_HEAR", 1)
    monkeypatch.setattr(start, "_MINUTES_TO_WAIT", 0)
    answers = _agree_all([_report(0), _report(2)], world_size=5)
    assert len(set(answers)) == 1
    assert answers[0].startswith("ranks 1, 3 to 4 did not start within ")


def test_the_store_of_an_earlier_start_is_refused():
    store = dist.HashStore()
    assert agree(store, _report(0), 1) is None
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in agree(store, _report(0), 1)


def test_many_ranks_and_hosts_are_listed_in_short():
    reports = [_report(rank, f"host{rank // 8}", tp="8") for rank in range(64)]
    reports[9] = _report(9, "host1", tp="4")
    assert difference(reports).splitlines()[1] == (
        "- tp: 8 on ranks 0 to 8, 10 to 63 (host0, host1, host2 and 5 more); 4 on rank 9 (host1)"
    )


def test_a_setting_that_one_rank_does_not_know():
    assert "- new: 1 on rank 0 (a); unknown on rank 1 (a)" in difference(
        [_report(0, new="1"), _report(1)]
    )


def test_settings_are_flags_and_packages_but_not_what_may_differ():
    settings = settings_of(parse("--seed 7 --device cpu --num-workers 3 --data-cache-path here"))
    assert settings["--seed"] == "7" and settings["--load"] == "not given"
    assert settings["the device"] == "cpu with gloo" and settings["torch"]
    assert not {"--num-workers", "--data-cache-path", "--tensorboard-dir"} & set(settings)


def test_one_process_asks_nobody(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert start_alike(lambda: 5, lambda found: pytest.fail("settings are not needed")) == 5


def _torchrun(monkeypatch, rank: int, **more: str) -> None:
    environment = dict(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for name, value in (environment | more).items():
        monkeypatch.setenv(name, value)


def test_own_error_is_raised_and_reported(monkeypatch):
    _torchrun(monkeypatch, 1)
    reported = []
    monkeypatch.setattr(start, "_agree_with_all", reported.append)
    with pytest.raises(ZeroDivisionError):
        start_alike(lambda: 1 // 0, lambda found: {})
    assert reported[0].problem.startswith("ZeroDivisionError: ") and reported[0].rank == 1


def test_anothers_error_is_raised_as_one_to_mend(monkeypatch):
    _torchrun(monkeypatch, 1)
    monkeypatch.setattr(start, "_agree_with_all", lambda own: f"verdict on {dict(own.settings)}")
    with pytest.raises(ConfigurationError, match=r"verdict on \{'lr': '5'\}"):
        start_alike(lambda: 5, lambda found: {"lr": str(found)})


@pytest.mark.parametrize(
    ("restarts", "shared", "refused"),
    [("2", "True", True), ("2", "False", False), ("0", "True", False)],
)
def test_restarts_with_a_store_that_outlives_them_are_refused(
    restarts: str, shared: str, refused: bool, monkeypatch
):
    elastic = dict(TORCHELASTIC_MAX_RESTARTS=restarts, TORCHELASTIC_USE_AGENT_STORE=shared)
    _torchrun(monkeypatch, 0, **elastic)
    monkeypatch.setattr(start, "_agree_with_all", lambda own: own.problem)
    if not refused:
        assert start_alike(lambda: 5, lambda found: {}) == 5
        return
    with pytest.raises(ConfigurationError) as raised:
        start_alike(lambda: 5, lambda found: {})
    assert "--max-restarts 2 needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in str(raised.value)


@pytest.mark.parametrize(
    ("code", "restarts", "expected"),
    [
        (128 + signal.SIGUSR1, "3", 0),
        (128 + signal.SIGUSR2, "3", 0),
        (128 + signal.SIGUSR1, "0", 138),
        (128 + signal.SIGTERM, "3", 143),
        (2, "3", 2),
    ],
)
def test_torchrun_does_not_restart_what_was_asked_to_stop(
    code: int, restarts: str, expected: int, monkeypatch
):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert exit_code_for_torchrun(code) == expected
