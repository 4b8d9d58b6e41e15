"""A tiny dataset for the tests of the training program."""

from pathlib import Path

import pytest

from tests.training.tiny_runs import write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of a dataset that a 20-iteration run reads a few times."""
    folder: Path = tmp_path_factory.mktemp("data")
    return write_dataset(folder)
