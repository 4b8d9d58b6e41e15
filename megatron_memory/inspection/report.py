"""An inspection's text, and the same for programs."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_memory.config import Config
from megatron_memory.config.flags import all_flags, flag_name, opposite
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.inspection.contents import STATE, Contents
from megatron_memory.inspection.difference import Difference
from megatron_memory.inspection.figures import Figures
from megatron_memory.inspection.findings import Findings
from megatron_memory.inspection.parameters import memory_share, parameters_by_part
from megatron_memory.inspection.slot_usage import describe_usage

_SHOWN = ("model", "memory", "precision")
_UNITS = ("bytes", "KB", "MB", "GB", "TB")


def figures_of_checkpoint(contents: Contents, tensors: Tensors, findings: Findings | None) -> dict:
    """All of it as plain values; None for what is not known, or is not finite.

    Args:
        contents: of the checkpoint.
        tensors: those to list.
        findings: None where no tensor was read.
    """
    parts = parameters_by_part(contents)
    shown: dict[str, Any] = {
        "load": str(contents.load),
        "format": contents.format,
        "folder": str(contents.folder),
        "names": "files" if contents.is_raw else "model",
        "num_bytes": contents.num_bytes,
        "iteration": contents.iteration,
        "consumed_samples": contents.consumed_samples,
        "consumed_tokens": contents.num_tokens,
        "layout": contents.common.get("layout"),
        "optimizer": {"states": contents.states, "step": contents.optimizer_step},
        "vocab_size": contents.vocab_size,
        "padded_vocab_size": contents.padded_vocab_size,
        "configuration": None if contents.config is None else _settings(contents.config),
        "parameters": parts,
        "memory_share": memory_share(parts),
        "tensors": {
            name: {"shape": list(tensor.shape), "dtype": dtype_text(tensor.dtype)}
            for name, tensor in tensors.items()
        },
        "damage": list(findings.damage if findings else contents.damage),
        "notes": list(findings.notes if findings else contents.notes),
    }
    if findings is not None:
        shown["duplicates"] = [dataclasses.asdict(found) for found in findings.duplicates]
        shown["slot_usage"] = {n: dataclasses.asdict(found) for n, found in findings.usage.items()}
        for name, figures in findings.figures.items():
            shown["tensors"][name] |= _finite(dataclasses.asdict(figures))
    return shown


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    def of(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: of(value) for name, value in figures.items()}


def _settings(config: Config) -> dict[str, Any]:
    return {
        key: getattr(getattr(config, flag.component), flag.field.name)
        for key, flag in all_flags().items()
    }


def describe(contents: Contents, tensors: Tensors, findings: Findings | None) -> Iterator[str]:
    """Lines for people."""
    yield from _heading(contents)
    if contents.config is not None:
        yield ""
        yield from _configuration(contents.config)
    yield ""
    yield from _parameters(contents)
    yield ""
    yield from _tensors(tensors, findings)
    if findings is not None:
        yield from describe_usage(contents, findings.usage)
    yield from _found(contents, findings)


def _heading(contents: Contents) -> Iterator[str]:
    names = ", by the names of its files" if contents.is_raw else ""
    yield f"{contents.folder}: {contents.format}{names}, {size_text(contents.num_bytes)}"
    samples, tokens = contents.consumed_samples, contents.num_tokens
    parts = [] if contents.iteration is None else [f"iteration {contents.iteration:,}"]
    parts += [] if samples is None else [f"{samples:,} samples"]
    parts += [] if tokens is None else [f"{tokens:,} tokens"]
    yield from _line("training", ", ".join(parts))
    layout = contents.common.get("layout")
    if isinstance(layout, dict):
        yield from _line(
            "written for", ", ".join(f"{name} {size}" for name, size in layout.items())
        )
    yield from _line("optimizer", _optimizer(contents))
    yield from _line("vocabulary", _vocabulary(contents))
    if contents.config is not None and contents.config.data.tokenizer_type is not None:
        yield from _line("tokenizer", _tokenizer(contents.config))


def _optimizer(contents: Contents) -> str:
    step = contents.optimizer_step
    kinds = ", ".join(contents.states) or "no states"
    return kinds if step is None else f"step {step:,}, {kinds}"


def _line(title: str, text: str) -> Iterator[str]:
    if text:
        yield f"  {title:<12} {text}"


def _vocabulary(contents: Contents) -> str:
    if contents.vocab_size is None:
        return "" if contents.padded_vocab_size is None else f"{contents.padded_vocab_size:,} rows"
    padded = contents.padded_vocab_size
    rows = f", padded to {padded:,}" if padded not in (None, contents.vocab_size) else ""
    return f"{contents.vocab_size:,} tokens{rows}"


def _tokenizer(config: Config) -> str:
    model = config.data.tokenizer_model
    gone = "" if model is None or Path(model).exists() else " (no longer there)"
    return f"{config.data.tokenizer_type} {model or ''}{gone}".strip()


def _configuration(config: Config) -> Iterator[str]:
    yield "configuration, but for what is as by default"
    for component in _SHOWN:
        if component == "memory" and not config.memory.enabled:
            yield from _line("memory", "none")
            continue
        words = [
            setting_text(flag.key, getattr(getattr(config, component), flag.field.name))
            for flag in all_flags().values()
            if flag.component == component
            and getattr(getattr(config, component), flag.field.name) != flag.field.default
            and (config.model.num_experts or not flag.key.startswith("moe_"))
        ]
        yield from _line(component, " ".join(words) or "all as by default")


def setting_text(key: str, value: Any) -> str:
    """A setting as on a command line."""
    if isinstance(value, bool):
        return flag_name(key) if value else flag_name(opposite(key))
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return f"{flag_name(key)} {'none' if value is None else value}"


def _parameters(contents: Contents) -> Iterator[str]:
    parts = parameters_by_part(contents)
    total = sum(parts.values())
    if parts.keys() <= {"other"}:
        yield f"{total:,} numbers, but for the optimizer's"
        return
    yield f"{total:,} parameters, {memory_share(parts):.1%} of them in memory layers"
    for part, count in parts.items():
        yield f"  {part:<20} {count:>18,} {count / total:>7.1%}"


def _tensors(tensors: Tensors, findings: Findings | None) -> Iterator[str]:
    width = max(map(len, tensors), default=0)
    head = f"{len(tensors)} tensors"
    columns = "" if findings is None else "      norm       mean    largest   zeros  not finite"
    yield f"{head:<{width + 2}} {'type':<8} {'shape':<20}{columns}"
    for name, tensor in tensors.items():
        shape = shape_text(tensor.shape)
        figures = findings.figures.get(name) if findings is not None else None
        text = f"  {name:<{width}} {dtype_text(tensor.dtype):<8} {shape:<20}"
        yield (text + (_figures(figures, tensor.shape) if figures else "")).rstrip()


def _figures(figures: Figures, shape: tuple[int, ...]) -> str:
    count = max(1, torch.Size(shape).numel())
    bad = figures.num_nan + figures.num_infinite
    return (
        f"{figures.norm:>10.4g} {figures.mean:>10.3g} {figures.largest:>10.4g} "
        f"{figures.num_zeros / count:>7.1%}  {bad or '':>10}"
    )


def _found(contents: Contents, findings: Findings | None) -> Iterator[str]:
    for group in findings.duplicates if findings else ():
        reason = f", as is to be: {group.reason}" if group.reason else ""
        yield f"same bytes ({size_text(group.num_bytes)} again{reason}): {', '.join(group.names)}"
    for note in findings.notes if findings else contents.notes:
        yield f"note: {note}"
    for problem in findings.damage if findings else contents.damage:
        yield f"damage: {problem}"


def figures_of_difference(difference: Difference) -> dict[str, Any]:
    """All of it as plain values; None for what is not finite."""
    shown = dataclasses.asdict(difference)
    shown["changed"] = [_finite(found) for found in shown["changed"]]
    shown["retyped"] = {n: list(map(dtype_text, pair)) for n, pair in difference.retyped.items()}
    return shown | {"is_none": difference.is_none}


def describe_difference(first: Contents, second: Contents, found: Difference) -> Iterator[str]:
    """Lines for people."""
    yield f"first:  {first.folder} ({first.format}, iteration {first.iteration})"
    yield f"second: {second.folder} ({second.format}, iteration {second.iteration})"
    if first.is_raw:
        yield "by the names of their files"
    for setting in found.settings:
        values = [setting_text(setting.key, value) for value in (setting.first, setting.second)]
        yield f"{'model' if setting.is_of_model else 'run'}: {values[0]} | {values[1]}"
    for where, names in (("first", found.only_first), ("second", found.only_second)):
        for text in _by_kind(names):
            yield f"only in the {where}: {text}"
    for name, shapes in found.reshaped.items():
        yield f"shapes: {name} {' | '.join(map(shape_text, shapes))}"
    for text in _retyped(found):
        yield f"types: {text}"
    yield from _changed(found)
    yield f"{found.num_equal} tensors have the same numbers"
    for problem in found.unreadable:
        yield f"damage: {problem}"


def _by_kind(names: tuple[str, ...]) -> Iterator[str]:
    """Names of weights; the optimizer's by kind."""
    kinds: dict[str, int] = {}
    for name in names:
        if name.startswith(STATE):
            kind = name.removeprefix(STATE).partition(".")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
        else:
            yield name
    for kind, count in kinds.items():
        yield f"{count} tensors {STATE}{kind}.*"


def _retyped(found: Difference) -> Iterator[str]:
    pairs: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for name, pair in found.retyped.items():
        pairs.setdefault(pair, []).append(name)
    for pair, names in pairs.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        yield f"{' | '.join(map(dtype_text, pair))}: {', '.join(names[:4])}{more}"


def _changed(found: Difference) -> Iterator[str]:
    if not found.changed:
        return
    width = max(len(tensor.name) for tensor in found.changed)
    head = f"{len(found.changed)} changed"
    yield f"{head:<{width + 2}}  norm of difference     largest   elements       rows"
    for tensor in found.changed:
        rows = tensor.share_of_rows_changed
        yield (
            f"  {tensor.name:<{width}} {tensor.relative_norm:>19.3g} {tensor.largest:>11.3g} "
            f"{tensor.share_changed:>10.2%} {'' if rows is None else format(rows, '>10.2%')}"
        ).rstrip()


def shape_text(shape: tuple[int, ...]) -> str:
    """As 64x32."""
    return "x".join(map(str, shape)) or "one number"


def size_text(num_bytes: int) -> str:
    """As 1.5 GB, in powers of 1000."""
    size, unit = float(num_bytes), 0
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{num_bytes} bytes" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def dtype_text(dtype: torch.dtype) -> str:
    """As bf16."""
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
