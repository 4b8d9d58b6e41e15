"""Heartbeats for `ft_launcher` of nvidia-resiliency-ext, where that has started this rank.

It watches each rank from a process of its own, and restarts ranks; what `RankWatch` finds ends the
process, which it hears of as well.
"""

import os
import time

from megatron_memory.optional import require

_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"
_SECONDS_BETWEEN_BEATS = 1.0


class LauncherBeats:
    """Tells ft_launcher of progress; does nothing under other launchers.

    Raises:
        ConfigurationError: ft_launcher runs, and its package does not import here.
    """

    def __init__(self) -> None:
        self._client = None
        self._next = 0.0
        if os.environ.get(_SOCKET):
            require("resiliency")
            from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

            self._client = RankMonitorClient()
            self._client.init_workload_monitoring()

    def beat(self) -> None:
        """There is progress; costs a message a second at most."""
        if self._client is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS_BETWEEN_BEATS
            self._client.send_heartbeat()

    def stop(self) -> None:
        """This rank has come to its end, and is watched no more."""
        if self._client is not None:
            self._client.shutdown_workload_monitoring()
            self._client = None
