"""What may be asked of the generation: which model, which prompts, how to choose tokens.

Nothing here needs torch.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from megatron_memory.config.convert import problem_with, value_type_of
from megatron_memory.config.flags import flag_name
from megatron_memory.config.option import option, option_of
from megatron_memory.config.problems import raise_problems
from megatron_memory.exceptions import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A trained model: its checkpoint, tokenizer and processes. All else is in the checkpoint."""

    load: str = option()
    """Directory that a training saved to, or one checkpoint's folder in it."""
    iteration: int | None = option(None, at_least=0)
    """Load the checkpoint of this iteration. Without it: the newest complete one."""
    tokenizer_type: str | None = None
    """Type of the tokenizer. Without it: the one of the training."""
    tokenizer_model: str | None = None
    """Folder, file or name of the tokenizer. Without it: the one of the training."""
    tensor_model_parallel_size: int = option(1, at_least=1)
    """Processes that share the model; the training may have used another number."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes the GPU where there is one."""
    memory_kernels: Literal["auto", "triton", "torch"] = "auto"
    """What computes the memory layers; auto: Triton's kernels on GPUs that run them, else torch."""
    memory_fp8_values: bool = False
    """Read the memory's values in fp8, as a training with this flag does anyway."""

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What to continue, and how much of it at once."""

    prompt: tuple[str, ...] = option((), synonyms=("prompts",))
    """Text to continue, in quotes. Several texts, or several such flags, for several prompts."""
    prompts_file: str | None = option(None, synonyms=("prompt_file",))
    """UTF-8 text file with one prompt a line."""
    prepend_eod: bool = False
    """Put an end of document before each prompt, so that it begins a document as in the training
    data of tools/preprocess_data.py --append-eod."""
    max_batch_size: int = option(16, at_least=1)
    """Largest number of prompts to continue at once; the cache grows with it."""

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from the model's distribution, and how many are."""

    num_tokens_to_generate: int | None = option(
        None, at_least=1, synonyms=("max_new_tokens", "out_seq_length")
    )
    """Most tokens to add to a prompt; an end of document ends it before. Without it: 64, or fewer
    where the model has no more positions behind the longest prompt."""
    greedy: bool = False
    """Always take the likeliest token; the same as --top-k 1 or --temperature 0."""
    temperature: float = option(1.0, at_least=0)
    """Divides the logits: below 1 the likely tokens gain, above 1 the unlikely ones."""
    top_k: int = option(0, at_least=0)
    """Choose among this many likeliest tokens only. 0: among all."""
    top_p: float = option(0.0, at_least=0, at_most=1)
    """Choose among the likeliest tokens that together reach this probability. 0: among all."""
    seed: int = option(1234, at_least=0, at_most=2**32 - 1)
    """Of the random choices: the same seed, prompts and batch size give the same text."""

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.top_k > 1 and self.top_p > 0:
            raise ConfigurationError(
                f"--top-k {self.top_k} and --top-p {self.top_p} both restrict the choice: give one "
                "of them."
            )
        if self.greedy and (self.top_k > 1 or self.top_p > 0 or self.temperature not in (0, 1)):
            raise ConfigurationError(
                f"--greedy always takes the likeliest token, so --temperature {self.temperature}, "
                f"--top-k {self.top_k} and --top-p {self.top_p} have no say: leave it or them away."
            )

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.greedy or self.top_k == 1 or self.temperature == 0


def _check_fields(component: Any) -> None:
    """Raise a `ConfigurationError` for values that a field by itself forbids."""
    hints = typing.get_type_hints(type(component))
    problems = (
        problem_with(
            flag_name(field.name),
            getattr(component, field.name),
            value_type_of(hints[field.name]),
            option_of(field),
        )
        for field in dataclasses.fields(component)
    )
    raise_problems(problem for problem in problems if problem is not None)
