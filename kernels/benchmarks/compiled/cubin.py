"""What a compiled kernel takes of a GPU, read from its cubin with Triton's own cuobjdump."""

import dataclasses
import functools
import re
import subprocess
import tempfile

import triton

# Of one multiprocessor; CUDA's programming guide, technical specifications by compute capability.
_SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024}
_REGISTERS = 64 * 1024
_WARPS = 64
_BLOCKS = 32
_RESERVED_SHARED_MEMORY = 1024  # the driver's share of every block

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_LOAD = re.compile(r"LDG(STS)?\b")
_STORE = re.compile(r"STG\b")
_LOCAL = re.compile(r"(LDL|STL)\b")
_MATMUL = re.compile(r"[HIQ]G?MMA\b")

ARCHITECTURES = tuple(sorted(_SHARED_MEMORY, reverse=True))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """Of one compiled kernel."""

    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread: arrays that live in memory and not in registers."""
    spills: int
    """Instructions that load or store local memory."""
    shared: int
    """Bytes of a block."""
    warps: int
    """That one multiprocessor holds at a time."""
    loads: int
    """Instructions that load global memory."""
    wide_loads: int
    """Of these, 16 bytes a thread."""
    loaded_bytes: int
    """Of a thread, each load counted once."""
    stores: int
    """Instructions that store global memory."""
    wide_stores: int
    """Of these, 16 bytes a thread."""
    matmuls: int
    """Instructions for the tensor cores."""


def read_resources(cubin: bytes, *, arch: int, num_warps: int, shared: int) -> Resources:
    """The resources of a cubin with one kernel.

    Args:
        arch: 80 for sm_80.
        num_warps: of a block.
        shared: bytes of shared memory that a launch asks for.
    """
    dump = _dump(cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", dump)
    instructions = _INSTRUCTION.findall(dump)
    assert usage and "EXIT" in instructions, f"cuobjdump has another form: {dump[:300]!r}"
    registers, stack, static = map(int, usage.groups())
    loads = [name for name in instructions if _LOAD.match(name)]
    stores = [name for name in instructions if _STORE.match(name)]
    return Resources(
        registers=registers,
        stack=stack,
        spills=sum(bool(_LOCAL.match(name)) for name in instructions),
        shared=shared + static,
        warps=warps_of_multiprocessor(arch, num_warps, registers, shared + static),
        loads=len(loads),
        wide_loads=sum(width(name) == 16 for name in loads),
        loaded_bytes=sum(map(width, loads)),
        stores=len(stores),
        wide_stores=sum(width(name) == 16 for name in stores),
        matmuls=sum(bool(_MATMUL.match(name)) for name in instructions),
    )


def width(instruction: str) -> int:
    """Bytes that a load or store of global memory moves for a thread: 16 for LDG.E.128."""
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1}
    return next((widths[part] for part in instruction.split(".") if part in widths), 4)


def warps_of_multiprocessor(arch: int, num_warps: int, registers: int, shared: int) -> int:
    """Warps that a multiprocessor holds of blocks of num_warps; 0 if not even one block fits.

    Each of its four schedulers has a quarter of the registers and gives them to warps in steps of
    256; shared memory goes to blocks in steps of 128 bytes (CUDA's occupancy calculator).
    """
    registers_of_warp = -(-registers * 32 // 256) * 256
    by_registers = _REGISTERS // 4 // registers_of_warp * 4 // num_warps
    shared_of_block = -(-(shared + _RESERVED_SHARED_MEMORY) // 128) * 128
    by_shared = _SHARED_MEMORY[arch] // shared_of_block
    return min(_BLOCKS, _WARPS // num_warps, by_registers, by_shared) * num_warps


@functools.cache  # Widths that compile to the same code are many.
def _dump(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
