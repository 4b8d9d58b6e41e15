"""Processes of this machine, also those whose numbers were used before."""

import os
import socket
from pathlib import Path


def machine() -> str:
    """Where process numbers mean the same: the kernel's start, and its namespace of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def started(pid: int) -> str:
    """When a process started, by its kernel; empty where none of that number runs."""
    try:
        # The command's name, which comes before, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc/self/stat").exists() else _started_without_proc(pid)
    return "" if fields[0] in "ZX" else fields[19]


def _started_without_proc(pid: int) -> str:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "unknown"
