"""What each launch may take of a GPU: what was recorded for it in registers.json, and no more.

Limits belong to a minor version of Triton and an architecture: code generation differs between
them. The file holds {"triton 3.7": {"sm_90": {launch: limit}}}.
"""

import dataclasses
import json
import os
from pathlib import Path

import triton

from benchmarks.compiled.cubin import Resources

PATH = Path(__file__).with_name("registers.json")
REGISTER_MARGIN = 8
"""More than recorded that is let pass: one step in which registers are given out."""
LEAST_WIDE_SHARE = 0.4
"""Of the bytes that a launch over wide rows loads: indices and weights come in smaller pieces."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """Recorded for one launch."""

    registers: int
    warps: int
    wide_loads: int

    @classmethod
    def of(cls, resources: Resources) -> "Limit":
        """What these resources would record."""
        return cls(
            registers=resources.registers,
            warps=resources.warps,
            wide_loads=resources.wide_loads,
        )


def triton_key() -> str:
    """The running Triton's name in the file."""
    return "triton " + ".".join(triton.__version__.split(".")[:2])


def flaws(resources: Resources, *, wide: bool) -> list[str]:
    """What no launch may have, recorded or not; `wide`: it reads rows of 16-byte multiples."""
    found = []
    if resources.stack:
        found.append(f"{resources.stack} bytes of stack")
    if resources.spills:
        found.append(f"{resources.spills} loads and stores of spilled registers")
    if resources.warps == 0:
        found.append("no block fits on a multiprocessor")
    share = 16 * resources.wide_loads / max(resources.loaded_bytes, 1)
    if wide and share < LEAST_WIDE_SHARE:
        found.append(f"{share:.0%} of the bytes come in 16-byte loads")
    return found


def regressions(resources: Resources, limit: Limit) -> list[str]:
    """What became worse than recorded."""
    found = []
    if resources.registers > limit.registers + REGISTER_MARGIN:
        found.append(f"{resources.registers} registers, recorded {limit.registers}")
    if resources.warps < limit.warps:
        found.append(f"{resources.warps} warps a multiprocessor, recorded {limit.warps}")
    if resources.wide_loads < limit.wide_loads:
        found.append(f"{resources.wide_loads} 16-byte loads, recorded {limit.wide_loads}")
    return found


def read_limits(path: Path) -> dict[str, dict[int, dict[str, Limit]]]:
    """By Triton's minor version, architecture and launch; empty without the file."""
    if not path.exists():
        return {}
    return {
        version: {
            int(arch.removeprefix("sm_")): {name: Limit(**limit) for name, limit in limits.items()}
            for arch, limits in archs.items()
        }
        for version, archs in json.loads(path.read_text()).items()
    }


def write_limits(path: Path, limits: dict[str, dict[int, dict[str, Limit]]]) -> None:
    """One line a launch, sorted, so that a change shows as the lines that changed."""
    lines = []
    for version, archs in sorted(limits.items()):
        blocks = []
        for arch, of_launch in sorted(archs.items()):
            entries = (
                f"      {json.dumps(name)}: {json.dumps(dataclasses.asdict(limit))}"
                for name, limit in sorted(of_launch.items())
            )
            blocks.append(f'    "sm_{arch}": {{\n' + ",\n".join(entries) + "\n    }")
        lines.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(blocks) + "\n  }")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    json.loads(text)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
