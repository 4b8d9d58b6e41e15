"""One inspection, from its options to its exit code."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from megatron_memory.conversion.options import Format
from megatron_memory.conversion.saved_state import Tensors
from megatron_memory.inspection.contents import open_checkpoint
from megatron_memory.inspection.difference import compare, open_both
from megatron_memory.inspection.findings import find, matching
from megatron_memory.inspection.options import Inspection
from megatron_memory.inspection.report import (
    describe,
    describe_difference,
    figures_of_checkpoint,
    figures_of_difference,
)

Say = Callable[[str], None]

EXIT_FOUND = 1
"""NaN, infinite numbers or damage; or differences."""


def inspect(inspection: Inspection, say: Say) -> int:
    """Say what is in a checkpoint, or how two differ.

    Returns:
        the exit code: 0, or EXIT_FOUND.

    Raises:
        CheckpointError: there is nothing that could be looked at.
    """
    subject, output = inspection.subject, inspection.output
    format_name = None if subject.format == "auto" else subject.format
    if len(inspection.paths) == 2:
        return _compare(inspection, format_name, say)
    contents = open_checkpoint(
        Path(inspection.paths[0]), format_name, raw=subject.raw, verify=output.verify
    )
    tensors = matching(contents.tensors, output.tensors)
    findings = None
    if not output.no_values:
        with progress(tensors) as on_read:
            findings = find(contents, output.tensors, on_read)
    if output.json:
        say(json.dumps(figures_of_checkpoint(contents, tensors, findings), indent=1))
    else:
        say("\n".join(describe(contents, tensors, findings)))
    return EXIT_FOUND if (findings.damage if findings else contents.damage) else 0


def _compare(inspection: Inspection, format_name: Format | None, say: Say) -> int:
    output = inspection.output
    one, another = (Path(path) for path in inspection.paths)
    first, second = open_both(one, another, format_name, raw=inspection.subject.raw)
    with progress(first.tensors, second.tensors) as on_read:
        found = compare(first, second, output.tensors, on_read)
    if output.json:
        say(json.dumps(figures_of_difference(found), indent=1))
    else:
        say("\n".join(describe_difference(first, second, found)))
    return 0 if found.is_none else EXIT_FOUND


@contextmanager
def progress(*groups: Tensors) -> Iterator[Callable[[int], object]]:
    """A bar of the bytes read; nothing where the output is no terminal."""
    total = sum(tensor.num_bytes for tensors in groups for tensor in tensors.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        yield bar.update
