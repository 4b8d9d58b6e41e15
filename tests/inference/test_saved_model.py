"""Finding a checkpoint, and refusing what cannot be run."""

import random
import re
import shutil

import pytest
from megatron.core import parallel_state

from megatron_memory.exceptions import CheckpointError, ConfigurationError
from megatron_memory.inference.options import ModelSource
from megatron_memory.inference.saved_model import find_saved_model
from megatron_memory.runtime import select_backend
from megatron_memory.training.checkpoint.checksums import write_sums
from tests.distributed import run_ranks
from tests.inference.saved_models import load, save_model, tiny_config
from tests.training.checkpoint.damages import KINDS


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    run_ranks(save_model, 2, tiny_config(folder, parallel=parallel), (5, 10))
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A copy to spoil, with iterations 5 and 10."""
    return shutil.copytree(original, tmp_path / "saved")


def find(load, world_size=1, **fields):
    source = ModelSource(load=str(load), device="cpu", **fields)
    return find_saved_model(source, select_backend("cpu"), world_size)


def test_newest_and_named_iterations(folder):
    newest, older = folder / "iter_0000010", folder / "iter_0000005"
    assert find(folder).folder == newest
    assert find(folder, iteration=5).folder == older
    assert find(older).folder == older
    assert find(older, iteration=10).folder == newest


def test_a_training_s_layout_is_left_behind(folder):
    parallel = find(folder).config.parallel
    assert parallel.tensor_model_parallel_size == 1
    assert not parallel.sequence_parallel


def test_another_tokenizer(folder):
    assert find(folder, tokenizer_type="ByteLevelTokenizer").config.data.vocab_size == 60
    data = find(folder, tokenizer_type="HuggingFaceTokenizer", tokenizer_model="there").config.data
    assert (data.tokenizer_type, data.tokenizer_model) == ("HuggingFaceTokenizer", "there")


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint. Check the path"):
        find(tmp_path / "nowhere")


def test_a_missing_iteration(folder):
    with pytest.raises(CheckpointError, match=r"--iteration 7: .*Saved iterations in .*: 5, 10"):
        find(folder, iteration=7)
    shutil.rmtree(folder / "iter_0000010")
    with pytest.raises(CheckpointError, match=r"no iter_0000010. Saved iterations in .*: 5$"):
        find(folder)


def test_a_checkpoint_without_configuration(folder):
    (folder / "iter_0000010" / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"config.yaml is missing. Complete is iteration 5"):
        find(folder)
    write_sums(folder / "iter_0000010", "xxh3_128")
    with pytest.raises(CheckpointError, match=r"config.yaml is missing, which describes the model"):
        find(folder)


def _load_damaged(folder) -> str:
    try:
        load(folder)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_flipped_bit_in_any_file_is_not_generated_from(folder):
    newest = folder / "iter_0000010"
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        KINDS["flip"](newest, path, random.Random(3))
        if path.suffix == ".distcp":
            (told,) = run_ranks(_load_damaged, 1, folder)
            assert f"{path} is damaged" in told and "Complete is iteration 5" in told
        else:
            with pytest.raises(CheckpointError, match=re.escape(str(path))):
                find(folder)
        path.write_bytes(content)


@pytest.mark.parametrize("world_size, ranks", [(1, 2), (2, 1), (4, 2)])
def test_processes_and_tensor_parallel_size_must_agree(folder, world_size, ranks):
    with pytest.raises(ConfigurationError) as raised:
        find(folder, world_size, tensor_model_parallel_size=ranks)
    message = str(raised.value)
    assert f"--tensor-model-parallel-size {ranks}: the run has {world_size} processes" in message
    assert f"--nproc-per-node {ranks}" in message


def test_a_model_that_the_processes_cannot_share(folder):
    with pytest.raises(ConfigurationError, match="--memory-value-dim 32 is not divisible by"):
        find(folder, 3, tensor_model_parallel_size=3)


def _error_of_loading(folder, **fields):
    with pytest.raises((CheckpointError, ConfigurationError)) as raised:
        load(folder, **fields)
    parallel_state.destroy_model_parallel()
    return str(raised.value)


def _errors_of_loading(folder):
    return [
        _error_of_loading(folder, tokenizer_type="ByteLevelTokenizer", iteration=5),
        _error_of_loading(folder, iteration=10),
    ]


def test_what_loading_finds(folder):
    """Another tokenizer than the training's, and a truncated file, on a rank."""
    shard = next((folder / "iter_0000010").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    ((tokenizer, truncated),) = run_ranks(_errors_of_loading, 1, folder)
    assert "--vocab-size 60" in tokenizer and "258" in tokenizer
    assert f"{shard} is truncated" in truncated
    assert "Complete is iteration 5" in truncated
