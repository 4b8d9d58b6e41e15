"""One conversion, from its options to its report."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_memory.conversion.folders import output_folder
from megatron_memory.conversion.hf import read_hf, write_hf
from megatron_memory.conversion.lingua import locate_lingua, read_lingua, write_lingua
from megatron_memory.conversion.lingua_params import not_in_lingua
from megatron_memory.conversion.megatron import layout_of, read_megatron, write_megatron
from megatron_memory.conversion.options import Checking, Conversion, Format, Target
from megatron_memory.conversion.own_tokenizer import check_is_the_trainings
from megatron_memory.conversion.progress import shown
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.conversion.unchanged import Unchanged
from megatron_memory.conversion.verify import check_read_back, check_twins, compare_logits
from megatron_memory.conversion.verify_files import check_files
from megatron_memory.conversion.verify_settings import check_settings_back
from megatron_memory.exceptions import CheckpointError, ConfigurationError
from megatron_memory.training.checkpoint.finding import locate

_VERIFIED_BY_ITSELF = 1_000_000_000
_READ: dict[Format, Callable[[Path], SavedState]] = {
    "megatron": read_megatron,
    "lingua": read_lingua,
    "hf": read_hf,
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Notify = Callable[[str], None]


def read_checkpoint(format_name: Format, load: Path) -> SavedState:
    """A checkpoint of any format.

    Raises:
        CheckpointError: there is none, it is damaged, or has what is not built here.
    """
    if not load.is_dir():
        raise CheckpointError(f"--load {load}: there is no such folder. Check the path")
    return _READ[format_name](load)


def convert(conversion: Conversion, notify: Notify) -> None:
    """Convert a checkpoint and, where asked for, verify the result.

    Raises:
        CheckpointError, ConfigurationError: it cannot be read, written or told in the format; or
            the result is not the same model, which stays where it is to be looked at.
    """
    source, target = conversion.source, conversion.target
    load, save = Path(source.load), Path(target.save)
    with output_folder(save, load) as folder:
        unchanged = Unchanged(_folder_read(source.source_format, load))
        state = read_checkpoint(source.source_format, load)
        for note in state.notes:
            notify(f"note: {note}")
        # Before a copy is left out, whether or not the result is verified.
        check_twins(state)
        state = _prepared(state, target, notify)
        if state.tokenizer is not None:
            unchanged.watch(state.tokenizer)
        dtype = _dtype(state, target)
        with shown(state, "writing") as counted:
            notes = _write(counted, target, folder, dtype)
        unchanged.check()
    for note in notes:
        notify(f"note: {note}")
    count = sum(torch.Size(t.shape).numel() for t in state.weights.values())
    notify(f"{save}: {len(state.weights)} tensors, {count:,} parameters, {_name(dtype)}")
    if conversion.checking.verify is not False:
        settings = check_settings_back(state, target, save, dtype)
        notify(f"verified: {settings} settings of the model")
        for compared in check_files(state, target.target_format, save):
            notify(f"verified: {compared}")
    if _verifies(conversion.checking, count, notify):
        _verify(state, conversion, dtype, notify)


def _folder_read(format_name: Format, load: Path) -> Path | None:
    """The checkpoint's own, for a run may go on beside it; None where there is none."""
    if not load.is_dir() or format_name == "hf":
        return load if load.is_dir() else None
    return locate(load) if format_name == "megatron" else locate_lingua(load)


def _prepared(state: SavedState, target: Target, notify: Notify) -> SavedState:
    if target.tokenizer_model is not None:
        if not Path(target.tokenizer_model).exists():
            raise ConfigurationError(
                f"--tokenizer-model {target.tokenizer_model}: there is no such file or folder"
            )
        state = dataclasses.replace(state, tokenizer=Path(target.tokenizer_model))
    if target.target_format != "lingua":
        is_given = target.tokenizer_model is not None
        check_is_the_trainings(state, is_given=is_given, notify=notify)
    if target.weights_only:
        if state.usage:
            notify("note: --weights-only leaves the counts of slots read out, too")
        # The exact weights are the optimizer's, and what is asked for all the same.
        if target.dtype == "fp32":
            state = dataclasses.replace(state, weights=state.exact_weights)
        return state.without_optimizer()
    if state.moments and target.target_format == "hf":
        notify("note: the format has no place for an optimizer's state, which is left out")
    if target.target_format == "lingua":
        for left_out in not_in_lingua(state):
            notify(f"note: the format has no place for {left_out}, left out")
    if state.usage and target.target_format != "megatron":
        notify("note: the format has no place for the counts of slots read, which are left out")
        return dataclasses.replace(state, usage={})
    return state


def _dtype(state: SavedState, target: Target) -> torch.dtype:
    """Of the weights that are written.

    Raises:
        CheckpointError: they are of several types, or of one that no checkpoint here has.
    """
    if target.dtype is not None:
        return _DTYPES[target.dtype]
    found = {tensor.dtype for tensor in state.weights.values()}
    if len(found) > 1 or not found <= set(_DTYPES.values()):
        names = ", ".join(sorted(_name(dtype) for dtype in found))
        raise CheckpointError(f"the weights are of type {names}: give --dtype fp32 or bf16")
    return found.pop()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write(state: SavedState, target: Target, folder: Path, dtype: torch.dtype) -> list[str]:
    """Returns what to tell the user."""
    if target.target_format == "hf":
        return write_hf(
            state,
            folder,
            model_type=target.hf_model_type,
            dtype=dtype,
            max_shard_bytes=target.max_shard_bytes,
        )
    if target.target_format == "megatron":
        return write_megatron(state, folder, Path(target.save), layout_of(target), dtype)
    write_lingua(state, folder, dtype)
    return []


def _verifies(checking: Checking, num_parameters: int, notify: Notify) -> bool:
    if checking.verify is None and num_parameters > _VERIFIED_BY_ITSELF:
        notify(
            "the weights are not verified, as the model is large; --verify does it, in memory for "
            "both models"
        )
        return False
    return checking.verify is not False


def _verify(state: SavedState, conversion: Conversion, dtype: torch.dtype, notify: Notify) -> None:
    source, target = conversion.source, conversion.target
    load, save = Path(source.load), Path(target.save)
    count = check_read_back(state, target.target_format, save, dtype)
    notify(f"verified: {count} tensors read back bit for bit, none missing, none left over")
    report = compare_logits(state, source.source_format, load, target.target_format, save, dtype)
    notify(f"verified: {report}")
    tolerance = conversion.checking.tolerance
    if not math.isfinite(report.largest_logit):
        raise CheckpointError(
            f"--verify: the logits of {load} are no finite numbers, so that there is nothing to "
            f"compare: {save} holds the same bits, and no more is known. "
            f"tools/inspect_checkpoint.py {load} names the tensors with NaN or infinity"
        )
    if not report.relative <= tolerance:
        raise CheckpointError(
            f"--verify: the logits differ by {report.relative:.3g} of the largest, more than "
            f"--tolerance {tolerance:g}: {save} is not the same model. Do not use it"
        )
