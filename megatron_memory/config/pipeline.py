"""Which layers each pipeline rank computes: Megatron-LM's flags and arithmetic.

megatron-core is given the outcome as its layout (model/config.py), so that there is one plan.
"""

import dataclasses
import functools
import re
from dataclasses import dataclass

from megatron_memory.config.model import ModelConfig
from megatron_memory.config.parallel import ParallelConfig
from megatron_memory.exceptions import ConfigurationError

_LAYOUT_FORM = (
    "Write a stage after the other, parted by |, with E for the embedding, t for a layer, L for "
    'the loss, (...)*n and t*n for repetitions: "Et*3|(t*4|)*2t*3L"'
)

_LONGEST_LAYOUT = 65536
_STAGE_FIELDS = (
    "pipeline_model_parallel_layout",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Consecutive layers that one pipeline rank computes before it sends on: a model chunk."""

    rank: int
    """Pipeline rank."""
    chunk: int
    """Counts the stages of this rank, from 0; more than one with interleaving."""
    layers: tuple[int, ...]
    """Counted from 0 over the whole model."""
    has_embedding: bool = False
    """Whether it begins with the embedding."""
    has_loss: bool = False
    """Whether it ends with the final norm, the output layer and the loss."""


@functools.lru_cache(maxsize=64)
def pipeline_stages(model: ModelConfig, parallel: ParallelConfig) -> tuple[Stage, ...]:
    """The stages in the order of the model; one with everything without pipelining.

    Remembered: planning asks for them for each stage and each table of a plan.

    Raises:
        ConfigurationError: the layers cannot be spread so; names the flags and what would do.
    """
    num_ranks = parallel.pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout is not None:
        sizes = _sizes_in_layout(model, parallel)
    else:
        sizes = _even_sizes(model, parallel)
    stages, first = [], 0
    for i, size in enumerate(sizes):
        stages.append(
            Stage(
                rank=i % num_ranks,
                chunk=i // num_ranks,
                layers=tuple(range(first, first + size)),
                has_embedding=i == 0,
                has_loss=i == len(sizes) - 1,
            )
        )
        first += size
    return tuple(stages)


def num_chunks(stages: tuple[Stage, ...]) -> int:
    """Stages of each rank: 1 without interleaving."""
    return 1 + max(stage.chunk for stage in stages)


def rank_of_layers(stages: tuple[Stage, ...]) -> dict[int, int]:
    """Layer to pipeline rank."""
    return {layer: stage.rank for stage in stages for layer in stage.layers}


def stage_flags(parallel: ParallelConfig) -> list[str]:
    """The flags given that say which layers a stage has."""
    plain = ParallelConfig()
    given = (name for name in _STAGE_FIELDS if getattr(parallel, name) != getattr(plain, name))
    return ["--" + name.replace("_", "-") for name in given]


def without_stage_flags(parallel: ParallelConfig) -> ParallelConfig:
    """With equal stages, one for each rank."""
    plain = ParallelConfig()
    return dataclasses.replace(parallel, **{name: getattr(plain, name) for name in _STAGE_FIELDS})


def layout_text(sizes: list[int]) -> str:
    """`--pipeline-model-parallel-layout` for stages of so many layers each."""
    texts = ["t" * size for size in sizes]
    return "|".join(["E" + texts[0], *texts[1:]]) + "L"


def _sizes_in_layout(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    layout, num_ranks = (
        parallel.pipeline_model_parallel_layout,
        parallel.pipeline_model_parallel_size,
    )
    assert layout is not None, "called with a layout"
    flag = f"--pipeline-model-parallel-layout {layout}"
    _refuse_beside_layout(parallel, flag)
    stages = _expand(layout).split("|")
    whole = "".join(stages)
    if re.fullmatch("Et*L", whole) is None:
        raise ConfigurationError(
            f"{flag}: as a whole it must be one E, then layers, then one L. {_LAYOUT_FORM}."
        )
    if len(stages) % num_ranks:
        raise ConfigurationError(
            f"{flag} has {len(stages)} stages, which is not a multiple of "
            f"--pipeline-model-parallel-size {num_ranks}: each rank has equally many."
        )
    if num_ranks == 1 and len(stages) > 1:
        raise ConfigurationError(
            f"{flag} has {len(stages)} stages, and --pipeline-model-parallel-size is 1: raise it, "
            "or leave the layout away."
        )
    if whole.count("t") != model.num_layers:
        raise ConfigurationError(
            f"{flag} has {whole.count('t')} layers, and --num-layers is {model.num_layers}: make "
            "them equal."
        )
    return [stage.count("t") for stage in stages]


def _expand(layout: str) -> str:
    """Without repetitions and commas, which are ornament."""
    text = layout.replace(",", "").replace(" ", "")
    text = re.sub(r"\(([^)]+)\)\*(\d+)", _repeated, text)
    return re.sub(r"(.)\*(\d+)", _repeated, text)


def _repeated(match: re.Match[str]) -> str:
    what, times = match.groups()
    if len(times) > 9 or len(what) * int(times) > _LONGEST_LAYOUT:
        raise ConfigurationError(
            f"--pipeline-model-parallel-layout: {what[:40]}*{times[:20]} is longer than "
            f"{_LONGEST_LAYOUT} parts: no model has as many layers"
        )
    return what * int(times)


def _refuse_beside_layout(parallel: ParallelConfig, flag: str) -> None:
    others = [other for other in stage_flags(parallel) if other not in flag]
    if others:
        raise ConfigurationError(
            f"{flag} says where every layer goes, and so does {others[0]}: leave one of them away."
        )


def _even_sizes(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Layers of each stage, as even as the flags ask for."""
    ends = (parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers)
    if ends == (None, None):
        return _equal_sizes(model, parallel)
    if (
        parallel.account_for_embedding_in_pipeline_split
        or parallel.account_for_loss_in_pipeline_split
    ):
        raise ConfigurationError(
            "--account-for-embedding-in-pipeline-split and --account-for-loss-in-pipeline-split "
            "cannot be combined with --decoder-first-pipeline-num-layers and "
            "--decoder-last-pipeline-num-layers, which say the sizes already: leave either away."
        )
    if parallel.num_layers_per_virtual_pipeline_stage is not None:
        raise ConfigurationError(
            "--num-layers-per-virtual-pipeline-stage is for ranks with equally many layers: with "
            "--decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers give "
            "--num-virtual-stages-per-pipeline-rank instead."
        )
    per_rank = _sizes_with_given_ends(model.num_layers, parallel.pipeline_model_parallel_size, ends)
    chunks = parallel.num_virtual_stages_per_pipeline_rank or 1
    for size in per_rank:
        if size % chunks:
            raise ConfigurationError(
                f"A pipeline rank has {size} layers, which is not a multiple of "
                f"--num-virtual-stages-per-pipeline-rank {chunks}: change one of them."
            )
    return [size // chunks for size in per_rank] * chunks


def _sizes_with_given_ends(
    num_layers: int, num_ranks: int, ends: tuple[int | None, int | None]
) -> list[int]:
    """Layers of each rank, where those of the first or the last one are given."""
    if num_ranks == 1:
        raise ConfigurationError(
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers need "
            "--pipeline-model-parallel-size 2 or more."
        )
    first, last = ends
    given = {0: first, num_ranks - 1: last}
    fixed = {rank: size for rank, size in given.items() if size is not None}
    rest, others = num_layers - sum(fixed.values()), num_ranks - len(fixed)
    share, left = divmod(rest, others) if others else (0, rest)
    if rest < 0 or left:
        raise ConfigurationError(
            f"--num-layers {num_layers} leaves {rest} layers for {others} pipeline ranks after "
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers, which is "
            "not an equal share each: change one of these sizes, or say each stage's layers by "
            "--pipeline-model-parallel-layout."
        )
    return [fixed.get(rank, share) for rank in range(num_ranks)]


def _equal_sizes(model: ModelConfig, parallel: ParallelConfig) -> list[int]:
    """Equal stages; embedding and loss may count as a layer each."""
    num_ranks = parallel.pipeline_model_parallel_size
    embedding = int(parallel.account_for_embedding_in_pipeline_split)
    loss = int(parallel.account_for_loss_in_pipeline_split)
    total = model.num_layers + embedding + loss
    shown = f"--num-layers {model.num_layers}"
    if embedding + loss:
        shown += f" and {embedding + loss} more for embedding and loss"
    chunks = _num_virtual_stages(parallel, total, shown)
    if total % (num_ranks * chunks):
        times = f" x {chunks} virtual stages" if chunks > 1 else ""
        raise ConfigurationError(
            f"{shown} cannot be split evenly over --pipeline-model-parallel-size {num_ranks}"
            f"{times}: choose a multiple of {num_ranks * chunks}, or say each stage's layers by "
            "--pipeline-model-parallel-layout (or --decoder-first-pipeline-num-layers and "
            "--decoder-last-pipeline-num-layers)."
        )
    sizes = [total // (num_ranks * chunks)] * (num_ranks * chunks)
    sizes[0] -= embedding
    sizes[-1] -= loss
    return sizes


def _num_virtual_stages(parallel: ParallelConfig, num_layers: int, shown: str) -> int:
    stages = parallel.num_virtual_stages_per_pipeline_rank
    layers = parallel.num_layers_per_virtual_pipeline_stage
    num_ranks = parallel.pipeline_model_parallel_size
    if stages is not None and layers is not None:
        raise ConfigurationError(
            f"--num-virtual-stages-per-pipeline-rank {stages} and "
            f"--num-layers-per-virtual-pipeline-stage {layers} say the same thing: leave one away."
        )
    if num_ranks == 1 and (stages or layers) is not None:
        raise ConfigurationError(
            "--num-virtual-stages-per-pipeline-rank and --num-layers-per-virtual-pipeline-stage "
            "interleave the stages of a pipeline: they need --pipeline-model-parallel-size 2 or "
            "more."
        )
    if layers is None:
        return stages or 1
    if num_layers % (num_ranks * layers):
        raise ConfigurationError(
            f"{shown} is not a multiple of --pipeline-model-parallel-size {num_ranks} x "
            f"--num-layers-per-virtual-pipeline-stage {layers} = {num_ranks * layers}: change one "
            "of them."
        )
    return num_layers // (num_ranks * layers)
