"""The command line of the generation, and where its prompts come from."""

import pytest

from megatron_memory.exceptions import ConfigurationError
from megatron_memory.inference.arguments import parse_request, read_prompts
from megatron_memory.inference.options import Prompts, Sampling

NEEDED = ["--load", "runs", "--prompt", "a"]


def test_defaults():
    request = parse_request(NEEDED)
    assert request.source.load == "runs"
    assert request.source.iteration is None
    assert request.source.tensor_model_parallel_size == 1
    assert request.prompts.prompt == ("a",)
    assert request.sampling == Sampling()


def test_every_prompt_flag_adds_prompts():
    words = ["--load=runs", "--prompt", "a b", "c", "--prompts", "d", "--prompt=-5 degrees"]
    assert parse_request(words).prompts.prompt == ("a b", "c", "d", "-5 degrees")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--num-tokens-to-generate", "7"], Sampling(num_tokens_to_generate=7)),
        (["--num_tokens_to_generate=7"], Sampling(num_tokens_to_generate=7)),
        (["--max-new-tokens", "7"], Sampling(num_tokens_to_generate=7)),
        (["--out_seq_length", "7"], Sampling(num_tokens_to_generate=7)),
        (["--top_k", "3", "--temperature", "0.5"], Sampling(top_k=3, temperature=0.5)),
        (["--top-k=3"], Sampling(top_k=3)),
        (["--top_p", "0.9", "--seed", "0"], Sampling(top_p=0.9, seed=0)),
        (["--greedy"], Sampling(greedy=True)),
    ],
)
def test_spellings(words, expected):
    assert parse_request([*NEEDED, *words]).sampling == expected


@pytest.mark.parametrize(
    "words, message",
    [
        (["--temperature", "-1"], "--temperature is -1.0: it must be at least 0"),
        (["--temperature", "nan"], "--temperature is nan: it must be a finite number"),
        (["--temperature", "warm"], "--temperature is 'warm', but expects a number"),
        (["--top-p", "1.5"], "--top-p is 1.5: it must be at least 0 and at most 1"),
        (["--top-k", "-1"], "--top-k is -1: it must be at least 0"),
        (["--top-k", "4", "--top-p", "0.5"], "--top-k 4 and --top-p 0.5 both restrict"),
        (["--greedy", "--top-p", "0.5"], "--greedy always takes the likeliest token"),
        (["--greedy", "--temperature", "0.5"], "--greedy always takes the likeliest token"),
        (["--max-new-tokens", "0"], "--num-tokens-to-generate is 0: it must be at least 1"),
        (["--iteration", "-1"], "--iteration is -1"),
        (["--max-batch-size", "0"], "--max-batch-size is 0"),
        (["--tensor-model-parallel-size", "0"], "--tensor-model-parallel-size is 0"),
        (["--device", "tpu"], "--device is 'tpu': it must be one of auto, cpu, cuda"),
        (["--temprature", "1"], "--temprature is not a flag .* Did you mean --temperature?"),
        (["--micro-batch-size", "1"], "--micro-batch-size is not a flag"),
        (["--seed", "1", "2"], "'2' belongs to no flag"),
        (["--seed"], "--seed: expected one argument"),
        (["--prompt", "-a"], "after an equals sign"),
    ],
)
def test_wrong_flags(words, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_request([*NEEDED, *words])


def test_load_is_required():
    with pytest.raises(ConfigurationError, match="--load is required"):
        parse_request(["--prompt", "a"])


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        parse_request(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for name in ("--load", "--prompt", "--top-k", "--max-new-tokens", "--prepend-eod", "--device"):
        assert name in text


def test_what_is_greedy():
    assert Sampling(greedy=True).is_greedy
    assert Sampling(top_k=1).is_greedy
    assert Sampling(temperature=0).is_greedy
    assert not Sampling().is_greedy


def test_prompts_of_flags_and_file(tmp_path):
    file = tmp_path / "prompts.txt"
    prompts = Prompts(prompt=("zero",), prompts_file=str(file))
    # Also as an editor on Windows writes it.
    for content in (b"one\ntwo words\n", b"\xef\xbb\xbfone\r\ntwo words", b"one\r\ntwo words\r\n"):
        file.write_bytes(content)
        assert read_prompts(prompts) == ["zero", "one", "two words"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\n\nb\n", "line 2 is empty"),
        (b"\n", "line 1 is empty"),
        (b"\xff", "UTF-8"),
        (b"", "prompts.txt is empty"),
        (b"\xef\xbb\xbf", "prompts.txt is empty"),
    ],
)
def test_wrong_prompt_files(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        read_prompts(Prompts(prompts_file=str(file)))


def test_missing_prompts(tmp_path):
    with pytest.raises(ConfigurationError, match="--prompt is missing"):
        read_prompts(Prompts())
    with pytest.raises(ConfigurationError, match='--prompt "" is empty'):
        read_prompts(Prompts(prompt=("a", "")))
    with pytest.raises(ConfigurationError, match="--prompts-file .*nowhere.* cannot be read"):
        read_prompts(Prompts(prompts_file=str(tmp_path / "nowhere")))


def test_a_file_without_end_is_no_file_of_prompts():
    with pytest.raises(ConfigurationError, match="--prompts-file /dev/zero has more than"):
        read_prompts(Prompts(prompts_file="/dev/zero"))
