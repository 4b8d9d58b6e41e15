"""Which format a folder has, by its files' names."""

import re
from pathlib import Path

from megatron_memory.conversion.lingua import CONSOLIDATED, PARAMS
from megatron_memory.conversion.options import Format
from megatron_memory.exceptions import CheckpointError
from megatron_memory.training.checkpoint.folders import TRACKER, saved_iterations
from megatron_memory.training.checkpoint.metadata_file import METADATA_FILE

_LINGUA_ITERATION = re.compile(r"\d{10}")
_HF_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")


def detect_format(load: Path) -> Format:
    """The format of a folder.

    Raises:
        CheckpointError: it looks like none, or is no folder.
    """
    if not load.is_dir():
        raise CheckpointError(f"--load {load}: there is no such folder. Check the path")
    # Before megatron: both have torch's list of tensors.
    if _is_lingua(load):
        return "lingua"
    if any((load / name).is_file() for name in (METADATA_FILE, "common.pt", TRACKER)):
        return "megatron"
    if saved_iterations(load):
        return "megatron"
    if any(any(load.glob(name)) for name in _HF_FILES):
        return "hf"
    raise CheckpointError(
        f"--load {load}: holds no checkpoint of a format that is known here. Give the folder of a "
        "run or of a checkpoint; --format says which format it has"
    )


def _is_lingua(load: Path) -> bool:
    if any((load / name).is_file() for name in (PARAMS, CONSOLIDATED)):
        return True
    runs = load / "checkpoints" if (load / "checkpoints").is_dir() else load
    return any(_LINGUA_ITERATION.fullmatch(path.name) for path in runs.iterdir())
