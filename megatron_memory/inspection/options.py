"""What an inspection is told; the flags of tools/inspect_checkpoint.py are made from it."""

import dataclasses
from typing import Literal

from megatron_memory.config.option import option
from megatron_memory.exceptions import ConfigurationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is looked at."""

    load: str | None = None
    """Folder of a run (its newest checkpoint), or of one checkpoint; the flag's name may be left
    out."""
    diff: tuple[str, ...] = ()
    """Compare with this checkpoint, of any format; or give both here."""
    format: Literal["auto", "megatron", "lingua", "hf"] = option("auto", synonyms=("from",))
    """megatron: a checkpoint of this program or of Megatron-LM (torch_dist); lingua: of the memory
    paper's public reference; hf: a Hugging Face folder; auto: what its files look like."""
    raw: bool = False
    """Names and tensors of the files themselves, not those of the model that they make."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What is said."""

    tensors: str = "*"
    """Read and list only the tensors whose names match, as in "*.router.*"."""
    no_values: bool = False
    """Names, shapes and types alone: no tensor is read."""
    verify: bool = False
    """Compare every file with the checksum that was written with it; all of them are read."""
    json: bool = False
    """All of it as JSON, for programs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """Say what is in a checkpoint, or how two differ."""

    subject: Subject
    """Checkpoints"""
    output: Output
    """Output"""

    def __post_init__(self) -> None:
        given = self.paths
        allowed = (2,) if self.subject.diff else (1,)
        if len(given) not in allowed:
            raise ConfigurationError(
                f"{len(given)} checkpoints are named ({', '.join(given) or 'none'}): give one, as "
                "in inspect_checkpoint.py DIR, or two, as in inspect_checkpoint.py --diff DIR DIR"
            )
        if self.subject.diff and self.output.verify:
            raise ConfigurationError(
                "--verify looks at one checkpoint: omit it, or look at each alone"
            )
        if self.subject.diff and self.output.no_values:
            raise ConfigurationError(
                "--no-values: a comparison reads the tensors. Omit it, or look at each alone"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """One checkpoint, or two to compare."""
        load = self.subject.load
        return (*(() if load is None else (load,)), *self.subject.diff)
