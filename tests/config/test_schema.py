"""Derived fields and the numbers computed from several components."""

import dataclasses

import pytest

from megatron_memory.config import Config, MemoryConfig, ModelConfig
from megatron_memory.config.flags import all_flags
from tests.config.helpers import parse


def model(**fields) -> ModelConfig:
    return ModelConfig(num_layers=2, num_attention_heads=4, seq_length=16, **fields)


def test_feed_forward_width_is_four_times_the_hidden_size():
    assert model(hidden_size=96).ffn_hidden_size == 384


@pytest.mark.parametrize(("hidden_size", "width"), [(4096, 10880), (768, 2048), (64, 128)])
def test_gated_feed_forward_width_is_two_thirds_down_to_a_multiple_of_64(hidden_size, width):
    assert model(hidden_size=hidden_size, swiglu=True).ffn_hidden_size == width


def test_given_values_are_not_derived_again():
    config = model(hidden_size=96, swiglu=True, ffn_hidden_size=100, kv_channels=7)
    assert (config.ffn_hidden_size, config.kv_channels) == (100, 7)


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({}, 4),
        ({"group_query_attention": True}, 1),
        ({"num_query_groups": 2}, 2),
        ({"group_query_attention": True, "num_query_groups": 2}, 2),
    ],
)
def test_query_groups(fields, groups):
    assert model(hidden_size=64, **fields).num_query_groups == groups


def test_memory_dimensions_follow_the_model():
    memory = parse("--memory-layers 1").memory
    assert (memory.value_dim, memory.key_dim) == (64, 32)


def test_key_dimension_follows_a_given_value_dimension():
    memory = parse("--memory-layers 1 --memory-value-dim 48").memory
    assert (memory.value_dim, memory.key_dim) == (48, 24)


def test_lowest_value_learning_rate_keeps_the_ratio_of_the_others():
    memory = parse("--memory-layers 1 --lr 3e-3 --min-lr 3e-5").memory
    assert memory.value_min_lr == pytest.approx(1e-5)


def test_a_given_lowest_value_learning_rate_is_kept():
    memory = parse("--memory-layers 1 --min-lr 1e-5 --memory-value-min-lr 0").memory
    assert memory.value_min_lr == 0.0


def test_decay_lasts_as_long_as_the_training():
    assert parse("--train-iters 70").optimizer.lr_decay_iters == 70
    assert parse("--train-iters 70 --lr-decay-iters 60").optimizer.lr_decay_iters == 60


def test_warmup_from_a_fraction_of_the_decay():
    assert parse("--lr-warmup-fraction 0.05").optimizer.warmup_iters == pytest.approx(5)
    assert parse("--lr-warmup-iters 3").optimizer.warmup_iters == 3


def test_one_memory_component_serves_models_of_several_widths():
    shared = MemoryConfig(layers="1")
    small, wide = parse(), parse("--hidden-size 128")
    assert dataclasses.replace(small, memory=shared).memory.value_dim == 64
    assert dataclasses.replace(wide, memory=shared).memory.value_dim == 128
    assert shared.value_dim is None


def test_default_split_belongs_to_data_path_only():
    assert parse().data.split == "969, 30, 1"
    assert parse("--train-data-path a", without=["--data-path"]).data.split is None


def test_ranks_and_microbatches():
    config = parse("--tensor-model-parallel-size 2 --micro-batch-size 2 --global-batch-size 24")
    assert config.model_parallel_size == 2
    assert config.data_parallel_size(world_size=8) == 4
    assert config.num_microbatches(world_size=8) == 3


def test_memory_is_off_without_layers():
    assert not MemoryConfig().enabled
    assert MemoryConfig(layers="0", num_half_keys=6).enabled
    assert MemoryConfig(num_half_keys=6).num_values == 36


def test_no_derived_field_is_left_open():
    config = parse("--memory-layers 1")
    for flag in all_flags().values():
        if flag.option.derived_from is not None:
            assert getattr(getattr(config, flag.component), flag.field.name) is not None, flag.key


def test_components_cannot_be_changed():
    config = parse()
    for field in dataclasses.fields(Config):
        component = getattr(config, field.name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(component, dataclasses.fields(component)[0].name, None)
