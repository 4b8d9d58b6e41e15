"""Heartbeats for ft_launcher, whose package is not installed here: its client is played."""

import sys
import types

import pytest

from megatron_memory.exceptions import ConfigurationError
from megatron_memory.optional import is_installed
from megatron_memory.training.ranks import launcher
from megatron_memory.training.ranks.launcher import LauncherBeats


def test_other_launchers_hear_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    beats = LauncherBeats()
    beats.beat()
    beats.stop()


@pytest.mark.skipif(is_installed("resiliency"), reason="the package is there")
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "/tmp/socket")
    with pytest.raises(ConfigurationError, match="nvidia-resiliency-ext is not installed"):
        LauncherBeats()


def test_beats_once_a_second_until_the_end(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    class Client:
        def __getattr__(self, name: str):
            return lambda: calls.append(name)

    module = types.ModuleType("nvidia_resiliency_ext.fault_tolerance")
    module.RankMonitorClient = Client
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext.fault_tolerance", module)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", types.ModuleType("package"))
    monkeypatch.setattr(launcher, "require", lambda name: None)
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", "/tmp/socket")
    now = [10.0]
    monkeypatch.setattr(launcher.time, "monotonic", lambda: now[0])
    beats = LauncherBeats()
    for seconds in (0.0, 0.5, 0.6, 0.1):
        now[0] += seconds
        beats.beat()
    beats.stop()
    beats.beat()
    assert calls == [
        "init_workload_monitoring",
        "send_heartbeat",
        "send_heartbeat",
        "shutdown_workload_monitoring",
    ]
