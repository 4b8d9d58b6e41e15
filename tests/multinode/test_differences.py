"""Hosts that do not fit together: every rank ends within seconds, and says why."""

import subprocess
from pathlib import Path

import pytest

from tests.multinode.hosts import Host
from tests.multinode.training import Node, tiny_flags

pytestmark = [pytest.mark.multinode, pytest.mark.distributed]

SECONDS_TO_END = 240
"""For a start of torchrun and torch on busy cores; a hang would last ten minutes."""


def _run_to_end(nodes: list[Node]) -> list[int]:
    try:
        return [node.program.wait(SECONDS_TO_END) for node in nodes]
    except subprocess.TimeoutExpired:
        pytest.fail("still running:\n" + "\n".join(node.log for node in nodes))
    finally:
        for node in nodes:
            node.program.power_off()


def test_another_flag_on_one_host_is_named_on_both(
    hosts: tuple[Host, Host], dataset: str, tmp_path: Path
):
    nodes = [Node(hosts, rank, tmp_path) for rank in (0, 1)]
    for node, size in zip(nodes, (1, 2), strict=True):
        flags = tiny_flags(dataset, tensor_model_parallel_size=size)
        node.start(flags, PROCESSES="1", MAX_RESTARTS="0")
    assert all(code != 0 for code in _run_to_end(nodes))
    for node in nodes:
        assert (
            "- --tensor-model-parallel-size: 1 on rank 0 (node-a); 2 on rank 1 (node-b)" in node.log
        )
        assert "Traceback" not in node.log.split("ConfigurationError")[0]


def test_save_on_the_hosts_own_disks_is_refused_on_both(
    hosts: tuple[Host, Host], dataset: str, tmp_path: Path
):
    """The same path on both, and another disk behind it: a bind mount that only one host sees."""
    save = tmp_path / "save"
    save.mkdir()
    nodes = [Node(hosts, rank, tmp_path) for rank in (0, 1)]
    for node in nodes:
        disk = tmp_path / f"disk-of-{node.host.name}"
        disk.mkdir()
        node.start(
            tiny_flags(dataset, save=save),
            before=f"mount --bind {disk} {save}",
            PROCESSES="1",
            MAX_RESTARTS="0",
        )
    assert all(code != 0 for code in _run_to_end(nodes))
    for node in nodes:
        assert f"--save {save} is not shared: rank 1 on node-b does not see what" in node.log
        assert "iteration " not in node.log
