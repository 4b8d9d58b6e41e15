"""Command line, YAML file, and a saved configuration."""

import subprocess
import sys

import pytest
import yaml

from megatron_memory.config import load_config, parse_arguments, save_config
from megatron_memory.config.flags import all_flags
from megatron_memory.exceptions import ConfigurationError
from tests.config.helpers import base_arguments, parse


def fails(arguments: list[str]) -> str:
    with pytest.raises(ConfigurationError) as error:
        parse_arguments(base_arguments() + arguments)
    return str(error.value)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(text, "utf-8")
        return str(path)

    return write


def test_values_of_every_kind():
    config = parse("--bf16 --lr 3e-4 --data-path 0.3 a 0.7 b --memory-layers 1,3 --seed=7")
    assert config.precision.bf16 is True
    assert config.optimizer.lr == 3e-4
    assert config.data.data_path == ("0.3", "a", "0.7", "b")
    assert config.memory.layers == "1,3"
    assert config.training.seed == 7


def test_a_value_with_spaces_or_dashes():
    config = parse_arguments([*base_arguments(), "--split", "9, 1", "--save=--odd"])
    assert (config.data.split, config.checkpoint.save) == ("9, 1", "--odd")


def test_underscores_are_dashes():
    assert parse("--override-opt_param-scheduler").optimizer.override_opt_param_scheduler


def test_the_last_of_two_flags_wins():
    assert parse("--seed 1 --seed 2").training.seed == 2


def test_megatron_names_for_a_value_of_another_flag():
    assert parse("--use-rotary-position-embeddings").model.position_embedding_type == "rope"
    assert parse("--recompute-activations").recompute.recompute_granularity == "selective"
    assert not parse("--grad-reduce-in-bf16").precision.accumulate_allreduce_grads_in_fp32
    assert parse("--persistent-save-interval 5").checkpoint.save_interval == 5
    assert parse("--layernorm-epsilon 1e-6").model.norm_epsilon == 1e-6


def test_switches_that_are_on_can_be_turned_off():
    assert parse().precision.accumulate_allreduce_grads_in_fp32
    precision = parse("--no-accumulate-allreduce-grads-in-fp32").precision
    assert not precision.accumulate_allreduce_grads_in_fp32
    assert not parse("--memory-layers 1 --no-memory-log-usage").memory.log_usage


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(yaml_file):
    path = yaml_file("hidden_size: 128\nseed: 5\nbf16: true\nno_save_rng: true\nsave: here\n")
    arguments = [*base_arguments("--hidden-size"), "--config", path]
    config = parse_arguments(arguments)
    assert (config.model.hidden_size, config.training.seed) == (128, 5)
    assert config.precision.bf16 and config.checkpoint.no_save_rng
    config = parse_arguments([*arguments, "--hidden-size", "256", "--no-bf16", "--save-rng"])
    assert (config.model.hidden_size, config.training.seed) == (256, 5)
    assert not config.precision.bf16
    assert not config.checkpoint.no_save_rng


def test_the_command_line_wins_wherever_it_names_the_file(yaml_file):
    path = yaml_file("seed: 5\n")
    assert parse_arguments([*base_arguments(), "--seed", "6", "--config", path]).training.seed == 6


def test_keys_may_have_dashes_numbers_may_lack_a_dot_and_lists_are_lists(yaml_file):
    path = yaml_file("min-lr: 1e-5\nmemory_layers: [1, 3]\ndata_path: [0.3, a, 0.7, b]\nsplit: 1\n")
    config = parse_arguments([*base_arguments("--data-path"), "--config", path])
    assert config.optimizer.min_lr == 1e-5
    assert config.memory.layers == "1,3"
    assert config.data.data_path == ("0.3", "a", "0.7", "b")
    assert config.data.split == "1"


def test_megatron_names_in_a_file(yaml_file):
    path = yaml_file("recompute_activations: true\ngrad_reduce_in_bf16: true\nno_bf16: false\n")
    config = parse_arguments([*base_arguments(), "--config", path])
    assert config.recompute.recompute_granularity == "selective"
    assert not config.precision.accumulate_allreduce_grads_in_fp32
    assert config.precision.bf16


def test_an_empty_file_changes_nothing(yaml_file):
    path = yaml_file("# nothing yet\n")
    assert parse_arguments([*base_arguments(), "--config", path]) == parse()


def test_a_saved_configuration_loads_as_an_equal_one(tmp_path):
    config = parse(
        "--memory-layers centered:1:1 --memory-variant peer --bf16 --swiglu --num-query-groups 2 "
        "--lr-warmup-fraction 0.1 --min-lr 1.7e-5 --recompute-granularity selective "
        "--recompute-modules mlp layernorm --data-path 0.3 a 0.7 b --no-memory-log-usage"
    )
    path = tmp_path / "new" / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    assert set(yaml.safe_load(path.read_text("utf-8"))) == set(all_flags())
    assert parse_arguments(["--config", str(path), "--seed", "9"]).training.seed == 9


def test_saving_again_replaces_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    save_config(parse("--seed 1"), path)
    save_config(parse("--seed 2"), path)
    assert load_config(path).training.seed == 2


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(OSError):
        save_config(parse(), tmp_path / "config.yaml")
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


def test_machine_dependent_settings_stay_open_in_a_saved_file(tmp_path):
    save_config(parse(), tmp_path / "config.yaml")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text("utf-8"))
    assert saved["transformer_impl"] is None
    assert saved["distributed_backend"] is None
    assert saved["device"] == "auto"


def test_unknown_flag_names_the_nearest():
    message = fails(["--hiden-size", "3"])
    assert message == "--hiden-size is not a known setting. Did you mean --hidden-size?"
    assert "--memory-top-k?" in fails(["--memory-topk", "3"])


def test_a_flag_that_is_near_to_none():
    assert fails(["--zzzzzz"]) == "--zzzzzz is not a known setting. See --help for all settings."


def test_flags_are_never_abbreviated():
    assert "Did you mean --hidden-size?" in fails(["--hidden", "3"])


def test_unknown_key_names_the_nearest_and_the_file(yaml_file):
    message = fails(["--config", yaml_file("memory_half_keys: 3\n")])
    assert "memory_half_keys in " in message and "run.yaml" in message
    assert "Did you mean --memory-num-half-keys?" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-layers", "abc"], "--num-layers is 'abc', but expects a whole number."),
        (["--lr", "fast"], "--lr is 'fast', but expects a number."),
        (["--num-layers", "0"], "--num-layers is 0: it must be at least 1 and at most 1024."),
        (["--lr", "nan"], "--lr is nan: it must be a finite number."),
        (["--adam-beta1", "1"], "--adam-beta1 is 1.0: it must be at least 0 and below 1."),
        (["--seed", "none"], "--seed is 'none', but expects a whole number."),
        (
            ["--memory-variant", "pk"],
            "--memory-variant is 'pk': it must be one of pkm, memory+, peer.",
        ),
        (
            ["--bf16", "true"],
            "--bf16 takes no value, but got true. Write --bf16 alone, or --no-bf16 for the "
            "opposite.",
        ),
        (
            ["--recompute-activations", "x"],
            "--recompute-activations takes no value, but got x.",
        ),
        (
            ["--split", "9", "1"],
            "--split takes one value, text, but got 9 1. Put a value that contains spaces in "
            "quotes.",
        ),
        (
            ["--save"],
            "--save takes one value, text, but got nothing. Put a value that contains spaces in "
            "quotes.",
        ),
    ],
)
def test_wrong_values_on_the_command_line(arguments, message):
    assert fails(arguments) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_layers: abc", "num_layers in {path} is 'abc', but expects a whole number."),
        ("num_layers: null", "num_layers in {path} is None, but expects a whole number."),
        ("bf16: 'yes'", "bf16 in {path} is 'yes', but expects true or false."),
        (
            "recompute_activations: maybe",
            "recompute_activations in {path} is 'maybe', but expects true or false.",
        ),
        ("micro_batch_size: 0", "micro_batch_size in {path} is 0: it must be at least 1."),
        (
            "memory:\n  top_k: 3",
            "memory in {path} holds keys of its own: settings are flat. Write each of top_k at "
            "the start of a line.",
        ),
        ("seed: 1\nseed: 2", "{path} sets seed twice, as seed and seed: remove one."),
        (
            "save_interval: 1\npersistent-save-interval: 2",
            "{path} sets save_interval twice, as save_interval and persistent-save-interval: "
            "remove one.",
        ),
        ("on: 1", "True in {path} is not a setting's name: put it in quotes."),
        (
            "- seed",
            "The configuration file {path} (--config) cannot be read: it is not a list of "
            "settings: write one `key: value` on each line.",
        ),
    ],
)
def test_wrong_values_in_a_file(text, message, yaml_file):
    path = yaml_file(text)
    assert fails(["--config", path]) == message.format(path=path)


def test_a_file_that_is_not_yaml(yaml_file):
    path = yaml_file("a: [1\n")
    message = fails(["--config", path])
    assert path in message and "not valid YAML" in message and "line 2" in message


def test_a_file_that_is_missing(tmp_path):
    path = str(tmp_path / "none.yaml")
    assert fails(["--config", path]) == (
        f"The configuration file {path} (--config) cannot be read: No such file or directory. "
        "Check the path."
    )
    with pytest.raises(ConfigurationError, match=r"none\.yaml"):
        load_config(path)


def test_two_files(yaml_file):
    path = yaml_file("seed: 1")
    assert "--config takes one YAML file, but got 2" in fails(["--config", path, "--config", path])


def test_a_word_before_any_flag():
    with pytest.raises(ConfigurationError, match="'pretrain' stands before any flag"):
        parse_arguments(["pretrain", *base_arguments()])


@pytest.mark.parametrize("flag", ["--num-layers", "--seq-length", "--train-iters", "--lr"])
def test_required_flags(flag):
    with pytest.raises(ConfigurationError, match=f"^{flag} is required: "):
        parse(without=[flag])


def test_required_flags_that_a_checkpoint_would_tell(tmp_path):
    (tmp_path / "config.yaml").write_text("num_layers: 4\n")
    with pytest.raises(ConfigurationError, match=f"--config {tmp_path}/config.yaml"):
        parse(f"--load {tmp_path}", without=["--num-layers"])


def test_everything_wrong_is_said_at_once():
    message = fails(["--num-layers", "x", "--fp16", "--hiden-size", "3"])
    assert message.startswith("The configuration has 3 problems:\n- ")
    assert all(name in message for name in ("--num-layers", "--fp16", "--hiden-size"))


def test_memory_settings_without_memory_layers_are_an_oversight():
    assert fails(["--memory-top-k", "4"]).startswith(
        "--memory-top-k has no effect without --memory-layers: give the layers"
    )


def test_memory_of_a_file_can_be_turned_off(yaml_file):
    path = yaml_file("memory_layers: '1,3'\nmemory_top_k: 4\n")
    config = parse_arguments([*base_arguments(), "--config", path, "--memory-layers", "none"])
    assert not config.memory.enabled


def test_parsing_needs_no_torch():
    program = (
        "import sys; from megatron_memory.config import parse_arguments, check_config; "
        f"check_config(parse_arguments({base_arguments()!r} + ['--memory-layers', '1']), 1); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
