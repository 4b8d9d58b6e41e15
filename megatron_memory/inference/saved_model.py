"""A model that a training saved, and the configuration to run it with."""

import dataclasses
from pathlib import Path

from megatron_memory.config import (
    CheckpointConfig,
    Config,
    ParallelConfig,
    RecomputeConfig,
    check_layers_available,
)
from megatron_memory.config.checks_memory import memory_problems
from megatron_memory.config.checks_parallel import parallel_problems
from megatron_memory.config.problems import raise_problems
from megatron_memory.data.tokenizer_hash import TOKENIZER_HASH
from megatron_memory.exceptions import CheckpointError, ConfigurationError
from megatron_memory.inference.options import ModelSource
from megatron_memory.optional import is_installed
from megatron_memory.runtime import Backend
from megatron_memory.training.checkpoint import folders
from megatron_memory.training.checkpoint.architecture import saved_config
from megatron_memory.training.checkpoint.finding import locate, read_intact_common
from megatron_memory.training.checkpoint.generation import GenerationSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A checkpoint and how to run it here."""

    folder: Path
    """Of the checkpoint."""
    config: Config
    """The training's, on the processes and the device of this run."""
    vocab_size: int | None = None
    """Tokens that the model has rows for, without padding; None where the checkpoint does not say
    it."""
    tokenizer_hash: str | None = None
    """Of the training's tokenizer, see `data.tokenizer_hash`; None where the checkpoint does not
    say it."""
    tokenizer_is_given: bool = False
    """Whether the user names the tokenizer for this run."""
    stop_tokens: tuple[int, ...] = ()
    """Ids that end a text besides the tokenizer's end of document, as its settings say."""


def find_saved_model(source: ModelSource, backend: Backend, world_size: int) -> SavedModel:
    """Find the checkpoint and check that this run can hold its model; needs no process group.

    Raises:
        CheckpointError: there is no checkpoint, or its config.yaml is missing or damaged.
        ConfigurationError: the model cannot be spread over this run's processes, or needs layers
            that this machine lacks.
    """
    folder = _folder(source)
    # The tensors' are compared when they are loaded.
    common = read_intact_common(folder)
    saved = saved_config(folder)
    if saved is None:
        raise CheckpointError(
            f"{folder / folders.CONFIG_FILE} is missing, which describes the model: the checkpoint "
            "was not completed, or another program wrote it. Copy the training's config.yaml there"
        )
    config = _for_inference(saved, source)
    ranks = source.tensor_model_parallel_size
    if world_size != ranks:
        raise ConfigurationError(
            f"--tensor-model-parallel-size {ranks}: the run has {world_size} processes. Start as "
            f"many: torchrun --nproc-per-node {ranks} -m megatron_memory.generate, or give "
            f"--tensor-model-parallel-size {world_size}."
        )
    raise_problems([*memory_problems(config), *parallel_problems(config, world_size)])
    check_layers_available(
        config, is_cuda=backend.is_cuda, has_transformer_engine=is_installed("te")
    )
    generation = GenerationSettings.of_common(common, folder)
    return SavedModel(
        folder=folder,
        config=config,
        vocab_size=common.get("vocab_size"),
        tokenizer_hash=common.get(TOKENIZER_HASH),
        tokenizer_is_given=bool(source.tokenizer_type or source.tokenizer_model),
        stop_tokens=() if generation is None else generation.stop_tokens(),
    )


def _folder(source: ModelSource) -> Path:
    load = Path(source.load)
    if source.iteration is not None:
        return _folder_of_iteration(load, source.iteration)
    folder = locate(load)
    if folder is None:
        raise CheckpointError(f"--load {load}: there is no checkpoint. Check the path")
    if not folder.is_dir():
        raise CheckpointError(
            f"--load {load}: there is no {folder.name}. {_choices(folder.parent)}"
        )
    return folder


def _folder_of_iteration(load: Path, iteration: int) -> Path:
    root = load if folders.iteration_of(load) is None else load.parent
    folder = folders.published_folder(root, iteration)
    if not folder.is_dir():
        raise CheckpointError(f"--iteration {iteration}: {folder} is not there. {_choices(root)}")
    return folder


def _choices(root: Path) -> str:
    iterations = ", ".join(map(str, folders.saved_iterations(root)))
    return f"Saved iterations in {root}: {iterations or 'none'}"


def _for_inference(saved: Config, source: ModelSource) -> Config:
    """The training's configuration, without what only a training needs.

    Sequence parallelism goes, too: a step of generation has one token of a sequence, which cannot
    be split.
    """
    replace = dataclasses.replace
    impl = saved.model.transformer_impl
    return replace(
        saved,
        # None: Transformer Engine where it is, else the local layers, which have the same tensors.
        model=replace(saved.model, transformer_impl="local" if impl == "local" else None),
        memory=replace(
            saved.memory,
            parallel_size=1,
            kernels=source.memory_kernels,
            fp8_values=saved.memory.fp8_values or source.memory_fp8_values,
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=source.tensor_model_parallel_size, device=source.device
        ),
        recompute=RecomputeConfig(),
        training=replace(saved.training, micro_batch_size=1, global_batch_size=1),
        checkpoint=CheckpointConfig(load=source.load),
        data=replace(
            saved.data,
            tokenizer_type=source.tokenizer_type or saved.data.tokenizer_type,
            tokenizer_model=source.tokenizer_model or saved.data.tokenizer_model,
        ),
    )
