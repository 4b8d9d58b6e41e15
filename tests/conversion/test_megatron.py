"""Our own checkpoints in other types and layouts, and trainings that go on from them."""

import dataclasses
import math
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_memory.config import CheckpointConfig, Config, PrecisionConfig, load_config
from megatron_memory.config.checks_memory import memory_problems
from megatron_memory.config.checks_parallel import parallel_problems
from megatron_memory.conversion import verify
from megatron_memory.conversion.convert import convert
from megatron_memory.conversion.lazy import from_memory
from megatron_memory.conversion.megatron import Layout, read_megatron, write_megatron
from megatron_memory.conversion.options import Checking
from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.exceptions import CheckpointError, ConfigurationError
from megatron_memory.training.checkpoint.checksums import write_sums
from tests.conversion.states import assert_same_tensors, conversion, golden_checkpoint, read_all
from tests.distributed import run_ranks
from tests.training.checkpoint.damages import KINDS
from tests.training.tiny_runs import change, runs, tiny_config, write_dataset

TABLE = "memory.shared.values.weight"
STEPS = 3


def _config(folder: Path, **parallel) -> Config:
    return tiny_config(
        str(folder / "tokens"),
        parallel=dict(device="cpu") | parallel,
        training=dict(micro_batch_size=2, global_batch_size=8, train_iters=STEPS, eval_iters=0),
        checkpoint={"save": str(folder / "run")},
        precision=PrecisionConfig(bf16=True),
    )


def _train(folder: Path) -> None:
    """bf16 with the distributed optimizer, whose states are cut otherwise than the weights."""
    runs([_config(folder, use_distributed_optimizer=True)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a run of three steps on two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder)
    run_ranks(_train, 2, folder)
    return folder


@pytest.mark.distributed
def test_state_is_read_whole(trained: Path):
    state = read_megatron(trained / "run")
    assert set(state.moments) == {"exp_avg", "exp_avg_sq"}
    assert state.iteration == STEPS and state.consumed_samples == 8 * STEPS
    weights, main_weights = read_all(state.weights), read_all(state.main_weights)
    assert weights.keys() == main_weights.keys() == state.moments["exp_avg"].keys()
    for name, weight in weights.items():
        assert torch.equal(main_weights[name].bfloat16(), weight), name
    assert any((main_weights[name] != weight.float()).any() for name, weight in weights.items())


@pytest.mark.distributed
def test_types(trained: Path, tmp_path: Path):
    """fp32 takes the main weights; bf16 with an optimizer keeps them; weights alone are alone."""
    exact = read_all(read_megatron(trained / "run").main_weights)
    for name, options in (
        ("fp32", dict(dtype="fp32")),
        ("again", dict(dtype="bf16")),
        ("alone", dict(weights_only=True)),
    ):
        source = tmp_path / "fp32" if name == "again" else trained / "run"
        convert(conversion("megatron", source, "megatron", tmp_path / name, **options), print)
    options = dict(dtype="fp32", weights_only=True)
    convert(
        conversion("megatron", trained / "run", "megatron", tmp_path / "both", **options), print
    )
    assert_same_tensors(read_all(read_megatron(tmp_path / "both").weights), exact)
    lingua = conversion("megatron", trained / "run", "lingua", tmp_path / "lingua", dtype="fp32")
    convert(dataclasses.replace(lingua, checking=Checking(verify=True)), print)
    fp32, again, alone = (read_megatron(tmp_path / name) for name in ("fp32", "again", "alone"))
    assert_same_tensors(read_all(fp32.weights), exact)
    assert not fp32.main_weights and set(fp32.moments) == {"exp_avg", "exp_avg_sq"}
    assert_same_tensors(read_all(again.main_weights), exact)
    rounded = {name: tensor.bfloat16() for name, tensor in exact.items()}
    assert_same_tensors(read_all(again.weights), rounded)
    assert_same_tensors(read_all(alone.weights), rounded)
    assert not alone.main_weights and not alone.moments
    assert not fp32.config.precision.bf16 and again.config.precision.bf16


def _go_on(folder: Path, load: Path, parallel: dict) -> list[float]:
    config = change(_config(folder, **parallel), "training", train_iters=2 * STEPS)
    config = change(
        config, "checkpoint", save=None, load=str(load), exit_on_missing_checkpoint=True
    )
    (seen,) = runs([config])
    assert seen.iterations[0] == STEPS + 1
    return seen.losses


@pytest.mark.distributed
def test_training_goes_on_at_another_layout(trained: Path, tmp_path: Path):
    """From a conversion as from the training's own checkpoint, optimizer states included."""
    save = tmp_path / "converted"
    options = dict(target_tensor_parallel_size=2, dtype="bf16")
    convert(conversion("megatron", trained / "run", "megatron", save, **options), print)
    parallel = dict(tensor_model_parallel_size=2, sequence_parallel=True)
    converted = run_ranks(_go_on, 2, trained, save, parallel)
    original = run_ranks(_go_on, 2, trained, trained / "run", parallel)
    assert converted == original and len(converted[0]) == STEPS


@pytest.mark.distributed
def test_training_goes_on_from_the_reference(tmp_path: Path):
    """A converted checkpoint has states but no groups; a run's own are taken, at any layout."""
    save = tmp_path / "converted"
    convert(conversion("lingua", golden_checkpoint("memory_plus"), "megatron", save), print)
    losses = [
        run_ranks(_train_on, world_size, save, tmp_path, parallel)[0]
        for world_size, parallel in (
            (1, {}),
            (2, dict(tensor_model_parallel_size=2, use_distributed_optimizer=True)),
        )
    ]
    # Rounding of fp32, over three steps whose losses are near 3.
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    # A new optimizer's first steps are far larger: without its states this would not hold.
    assert losses[0][1:] != pytest.approx(
        run_ranks(_train_on, 1, save, tmp_path, {}, True)[0][1:], abs=1e-3
    )


def _train_on(save: Path, folder: Path, parallel: dict, no_load_optim: bool = False) -> list[float]:
    if not (folder / "tokens.idx").exists() and torch.distributed.get_rank() == 0:
        write_dataset(folder)
    torch.distributed.barrier()
    saved = read_megatron(save).config
    config = tiny_config(str(folder / "tokens"), parallel=dict(device="cpu") | parallel)
    training = dataclasses.replace(saved.training, train_iters=27, eval_iters=0)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(saved.model, seq_length=16),
        memory=saved.memory,
        optimizer=dataclasses.replace(saved.optimizer, lr_decay_iters=60),
        training=training,
    )
    config = change(config, "data", vocab_size=258)
    # The reference's data is other than this: of it a converted checkpoint knows nothing.
    config = change(
        config,
        "checkpoint",
        load=str(save),
        no_load_optim=no_load_optim,
        allow_changed_data_order=True,
    )
    (seen,) = runs([config])
    return seen.losses


def test_padding_is_the_layouts(tmp_path: Path):
    """258 tokens: 384 rows on one rank, 512 on two; what a reader gets has 258."""
    for ranks, rows in ((1, 384), (2, 512)):
        save = tmp_path / str(ranks)
        options = dict(target_tensor_parallel_size=ranks)
        convert(conversion("lingua", golden_checkpoint("peer"), "megatron", save, **options), print)
        state = read_megatron(save)
        assert state.weights["output_layer.weight"].shape == (258, 64)
        assert state.config.parallel.tensor_model_parallel_size == ranks
        assert state.vocab_size == 258
        assert _stored_rows(save) == rows


def _stored_rows(save: Path) -> int:
    from megatron_memory.training.checkpoint.integrity import check_whole, tensor_shapes

    (folder,) = save.glob("iter_*")
    return tensor_shapes(check_whole(folder))["output_layer.weight"][0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("memory_gqa_vdim", dict(target_pipeline_parallel_size=3)),
        ("memory_plus", dict(target_memory_parallel_size=2)),
        ("memory_plus", dict(target_tensor_parallel_size=2, target_pipeline_parallel_size=1)),
    ],
)
def test_layout_is_written_down(name: str, options: dict[str, int], tmp_path: Path):
    """In config.yaml, for a run of as many ranks; the tensors are whole and the same."""
    source, save = tmp_path / "source", tmp_path / "out"
    convert(conversion("lingua", golden_checkpoint(name), "megatron", source), print)
    convert(conversion("megatron", source, "megatron", save, **options), print)
    before, after = read_megatron(source), read_megatron(save)
    assert_same_tensors(read_all(after.weights), read_all(before.weights))
    for kind, moments in before.moments.items():
        assert_same_tensors(read_all(after.moments[kind]), read_all(moments))
    config = after.config
    assert config == load_config(save / "config.yaml")
    parallel = config.parallel
    sizes = dict(
        target_tensor_parallel_size=parallel.tensor_model_parallel_size,
        target_pipeline_parallel_size=parallel.pipeline_model_parallel_size,
        target_memory_parallel_size=config.memory.parallel_size,
    )
    assert sizes == dict.fromkeys(sizes, 1) | options
    ranks = math.prod(options.values())
    # The batch is the run's own: one that any number of ranks can share.
    batch = dataclasses.replace(config.training, micro_batch_size=1, global_batch_size=ranks * 3)
    config = dataclasses.replace(config, training=batch)
    assert not [*memory_problems(config), *parallel_problems(config, ranks)]


def test_layout_that_cannot_be_is_refused(tmp_path: Path):
    """Layers 1, 2 and 3 share a table, and stages of two layers put them on two ranks."""
    options = dict(target_pipeline_parallel_size=2)
    golden = golden_checkpoint("memory_plus")
    with pytest.raises(ConfigurationError, match="pipeline"):
        convert(conversion("lingua", golden, "megatron", tmp_path / "out", **options), print)
    assert not (tmp_path / "out").exists()


def _verified(tmp_path: Path, change_tensor) -> None:
    """Convert and verify, with a writer that does something else to one tensor."""
    golden = golden_checkpoint("memory_plus")
    convert(conversion("lingua", golden, "megatron", tmp_path / "sound", verify=True), print)
    state = read_megatron(tmp_path / "sound")
    weights = dict(state.weights)
    change_tensor(weights)
    wrong = dataclasses.replace(state, weights=weights)
    (tmp_path / "wrong").mkdir()
    write_megatron(wrong, tmp_path / "wrong", tmp_path / "wrong", Layout())
    verify.check_read_back(state, "megatron", tmp_path / "wrong", torch.float32)


def test_verify_finds_one_changed_bit(tmp_path: Path):
    def flip(weights: dict) -> None:
        table = weights[TABLE].read()
        table.view(torch.int32)[200, 60] ^= 1
        weights[TABLE] = from_memory(table)

    with pytest.raises(CheckpointError, match=f"not what was converted: {TABLE}"):
        _verified(tmp_path, flip)


def test_verify_finds_what_is_missing_or_left_over(tmp_path: Path):
    def rename(weights: dict) -> None:
        weights["decoder.layers.9.mlp.linear_fc2.weight"] = weights.pop(TABLE)

    with pytest.raises(CheckpointError, match=rf"layers\.9.*{TABLE}"):
        _verified(tmp_path, rename)


def test_verify_finds_other_logits(tmp_path: Path):
    """Bits alone would not: the numbers are the same, and mean another model."""
    golden, save = golden_checkpoint("memory_plus"), tmp_path / "out"
    convert(conversion("lingua", golden, "megatron", save), print)
    (config,) = save.glob("iter_*/config.yaml")
    config.write_text(config.read_text().replace("interleaved: true", "interleaved: false"))
    write_sums(config.parent, CheckpointConfig().checksums)
    state = read_megatron(save)
    assert verify.check_read_back(state, "megatron", save, torch.float32) == 43 * 3
    report = verify.compare_logits(state, "lingua", golden, "megatron", save, torch.float32)
    assert report.relative == 0, "the state read back has the new setting, too"
    original = _reference_state(golden)
    report = verify.compare_logits(original, "lingua", golden, "megatron", save, torch.float32)
    assert report.relative > 0.01 and report.num_agreeing < report.num_tokens


def _reference_state(golden: Path) -> SavedState:
    from megatron_memory.conversion.lingua import read_lingua

    return read_lingua(golden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_values_go_where_bf16_goes(dtype: torch.dtype, tmp_path: Path):
    state = _reference_state(golden_checkpoint("peer"))
    memory = dataclasses.replace(state.config.memory, fp8_values=True)
    state = dataclasses.replace(state, config=dataclasses.replace(state.config, memory=memory))
    write_megatron(state.without_optimizer(), tmp_path, tmp_path, Layout(), dtype)
    written = read_megatron(tmp_path).config
    assert written.memory.fp8_values is written.precision.bf16 is (dtype == torch.bfloat16)


def test_copies_of_a_shared_table_must_be_equal(tmp_path: Path):
    state = _reference_state(golden_checkpoint("memory_plus"))
    assert [name for name, _, _ in state.twins] == [
        f"layers.{layer}.feed_forward.values.weight" for layer in (2, 3)
    ]
    verify.check_twins(state)
    name, one, another = state.twins[1]
    changed = from_memory(another.read() + 1)
    with pytest.raises(CheckpointError, match="layers.3.feed_forward.values"):
        verify.check_twins(dataclasses.replace(state, twins=((name, one, changed),)))


def test_a_folder_of_another_program_is_told(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match=r"of another program's, tools/convert_checkpoint\.py"
    ):
        read_megatron(tmp_path)


def test_damaged_checkpoint_of_ours_is_refused(tmp_path: Path):
    convert(conversion("lingua", golden_checkpoint("peer"), "megatron", tmp_path / "out"), print)
    (folder,) = (tmp_path / "out").glob("iter_*")
    for name in ("common.pt", "config.yaml", "__0_0.distcp", ".metadata"):
        copy = tmp_path / name / folder.name
        shutil.copytree(folder, copy)
        (copy / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            read_megatron(copy.parent)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        KINDS["flip"](folder, path, random.Random(4))
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            read_megatron(folder.parent)
        path.write_bytes(content)
    assert read_megatron(folder.parent).notes == ()
