"""Two hosts on one machine: network namespaces with addresses of their own, and a cable between.

A process of a host sees the host's own network, name, processes and mounts; the rest of the machine
it shares with us. Needs root, or rather the right to make namespaces.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

DEVICE = "cable0"
"""Name of the network device on each host."""


class NoNamespaces(Exception):
    """This machine, or this user, cannot make hosts; says which command failed, and how."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A network namespace."""

    name: str
    """The host's own name."""
    namespace: str
    """Its name for `ip netns`."""
    address: str
    """Of its end of the cable."""

    def start(
        self,
        command: list[str],
        *,
        folder: Path,
        log: Path,
        environment: Mapping[str, str],
        before: str = "true",
    ) -> "Program":
        """Start a program on this host, in `folder`, with its output appended to `log`.

        `before` is shell code that runs first, for mounts.
        """
        script = f'hostname {self.name} && {before} && cd "$1" && shift && exec "$@"'
        words = [*_in_namespace(self.namespace), "bash", "-c", script, "bash", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [*words, *command],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return Program(process)


def _in_namespace(namespace: str) -> list[str]:
    # --kill-child: the kernel kills every process of the host with its first.
    own = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return ["ip", "netns", "exec", namespace, "unshare", *own]


class Program:
    """A program on a host, with all that it starts."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def wait(self, timeout: float) -> int:
        """Its exit code; `timeout` in seconds."""
        return self._process.wait(timeout)

    def is_running(self) -> bool:
        return self._process.poll() is None

    def power_off(self) -> None:
        """Kill it and every process below it at once."""
        self._process.kill()
        self._process.wait()

    def children_of(self, text: str) -> list[int]:
        """Children of its process with `text` in the command line, the oldest first."""
        # unshare and then the program: the former has the latter's command line as its arguments.
        parents = [pid for pid in self._below(self._process.pid) if text in _command_line(pid)]
        return _children(parents[-1]) if parents else []

    def _below(self, pid: int) -> Iterator[int]:
        yield pid
        for child in _children(pid)[:1]:
            yield from self._below(child)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _command_line(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between; their processes must have ended by the end.

    Raises:
        NoNamespaces: with the command that failed and what it said.
    """
    # A subnet for documentation (RFC 5737), in namespaces: it cannot meet one that is in use.
    hosts = (
        Host(name="node-a", namespace=f"mm{os.getpid()}a", address="192.0.2.1"),
        Host(name="node-b", namespace=f"mm{os.getpid()}b", address="192.0.2.2"),
    )
    with contextlib.ExitStack() as stack:
        for host in hosts:
            _run("ip", "netns", "add", host.namespace)
            stack.callback(_run, "ip", "netns", "delete", host.namespace)
        first, second = (host.namespace for host in hosts)
        ends = ["peer", "name", DEVICE, "netns", second]
        _run("ip", "-n", first, "link", "add", DEVICE, "type", "veth", *ends)
        for host in hosts:
            ip = ("ip", "-n", host.namespace)
            _run(*ip, "address", "add", f"{host.address}/24", "dev", DEVICE)
            _run(*ip, "link", "set", DEVICE, "up")
            _run(*ip, "link", "set", "lo", "up")
            _run(*_in_namespace(host.namespace), "hostname", host.name)
        yield hosts


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError as error:
        raise NoNamespaces(f"{command[0]} is not installed (package iproute2)") from error
    if done.returncode:
        raise NoNamespaces(f"{' '.join(command)}: {done.stderr.strip()}")
