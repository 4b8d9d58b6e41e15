"""The data flags, as Megatron reads them, and what is said where they do not fit."""

import pytest
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import get_blend_from_list

from megatron_memory.data.blend import data_sources, parse_blend
from megatron_memory.exceptions import ConfigurationError


@pytest.mark.parametrize(
    "values",
    [["a"], ["a", "b"], ["a", "b", "c"], ["0.3", "a", "0.7", "b"], ["30", " a ", "1e1", "b"]],
)
def test_blends_are_those_of_megatron(values):
    blend = parse_blend("--data-path", values)
    assert (blend.prefixes, blend.weights) == get_blend_from_list(values)


def test_the_weight_of_a_single_dataset_says_nothing():
    blend = parse_blend("--data-path", ["0.5", "a"])
    assert (blend.prefixes, blend.weights) == (["a"], None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["0.5"], "a weight before each dataset or before none"),
        (["0.5", "a", "b"], "a weight before each dataset or before none"),
        (["0.5", "a", "b", "c"], "a weight before each dataset or before none"),
        (["a", "0.5"], "a weight before each dataset or before none"),
        (["0.5", "0.5"], "a weight before each dataset or before none"),
        (["0", "a", "1", "b"], "the weight of a is 0, but must be above 0"),
        (["1", "a", "-2", "b"], "the weight of b is -2, but must be above 0"),
        (["nan", "a", "1", "b"], "the weight of a is nan"),
    ],
)
def test_bad_blends(values, message):
    with pytest.raises(ConfigurationError, match=f"^--train-data-path.*{message}"):
        parse_blend("--train-data-path", values)


@pytest.mark.parametrize("split", ["969, 30, 1", "98,2", "1", "0.5,0,0.5", "149976,2353,0"])
def test_ranges_are_those_of_megatron(split):
    sources = data_sources(data_path=["a"], split=split)
    assert sources.ranges() == convert_split_vector_to_split_matrix(
        parse_and_normalize_split(split)
    )


@pytest.mark.parametrize(
    ("split", "plain"),
    [("1e2,1", "100,1"), ("98,2e-1", "98,0.2"), ("9_0,+10", "90,10"), ("1E-7,1", "0.0000001,1")],
)
def test_numbers_that_megatron_cuts_up(split, plain):
    found, expected = (data_sources(data_path=["a"], split=text) for text in (split, plain))
    assert found.ranges() == expected.ranges()


@pytest.mark.parametrize(
    "values", [["a", "b", "./a"], ["0.3", "a", "0.2", "sub/../a"], ["a", "{link}"]]
)
def test_a_dataset_is_named_once(values, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.bin").symlink_to("a.bin")
    with pytest.raises(ConfigurationError, match="^--data-path: a is there more than once"):
        parse_blend("--data-path", [value.format(link=tmp_path / "link") for value in values])


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0,0", "1,,1", "inf,1"])
def test_bad_splits(split):
    with pytest.raises(ConfigurationError, match=f"^--split {split}: up to three numbers"):
        data_sources(data_path=["a"], split=split)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, "no training data: give --data-path"),
        ({"valid_data_path": ["a"]}, "no training data: give --data-path"),
        ({"data_path": ["a"]}, "--data-path needs --split"),
        (
            {"data_path": ["a"], "split": "1", "test_data_path": ["b"]},
            "--data-path and --test-data-path exclude each other",
        ),
        ({"train_data_path": ["a"], "split": "1"}, "--split 1: cuts --data-path only"),
    ],
)
def test_flags_that_exclude_each_other(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        data_sources(**flags)
