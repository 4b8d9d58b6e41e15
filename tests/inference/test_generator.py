"""Generation with a cache chooses what the training's forward pass, which has none, says.

In fp32 the two round differently by about 1e-6 of a logit, and the two likeliest tokens of these
models are further apart, so the greedy texts are equal token by token. In bf16 they need not be:
see there.
"""

import dataclasses
from functools import partial

import pytest
import torch

from megatron_memory.exceptions import CheckpointError, ConfigurationError
from megatron_memory.inference.engine import InferenceEngine
from megatron_memory.inference.options import Sampling
from tests.distributed import run_ranks
from tests.inference.saved_models import (
    END,
    NUM_TOKENS,
    POSITIONS,
    PROMPTS,
    VARIANTS,
    VOCAB,
    greedy_without_cache,
    load,
    logits_without_cache,
    observe,
    save_and_observe,
    save_model,
    tiny_config,
    tokens_of,
)

GREEDY = Sampling(greedy=True, num_tokens_to_generate=NUM_TOKENS)
NUM_SAMPLES = 4000


def sampling(**fields) -> Sampling:
    """Of as many tokens as GREEDY."""
    return Sampling(**{"num_tokens_to_generate": NUM_TOKENS} | fields)


def greedy_texts(generator):
    """Of PROMPTS: all at once, one by one, two at once, and without a cache."""
    together = generator.generate(PROMPTS, GREEDY)
    alone = [generator.generate([prompt], GREEDY)[0] for prompt in PROMPTS]
    in_pairs = generator.generate(PROMPTS, GREEDY, max_batch_size=2)
    without_cache = [greedy_without_cache(generator.model, tokens_of(prompt)) for prompt in PROMPTS]
    return together, alone, in_pairs, without_cache


def seeded_texts(generator):
    """Of seeds 7, 8, and 7 again."""
    return [_tokens(generator, sampling(seed=seed)) for seed in (7, 8, 7)]


def _tokens(generator, how: Sampling):
    return [completion.tokens for completion in generator.generate(PROMPTS, how)]


@pytest.fixture(scope="module", params=VARIANTS)
def saved(request, tmp_path_factory):
    """A saved model's folder, greedy texts by the model that was saved, and what one rank reads."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config(folder, request.param)
    ((expected, seen),) = run_ranks(save_and_observe, 1, config, [greedy_texts, seeded_texts])
    assert len({token for tokens in expected for token in tokens}) > 10, "a test that cannot fail"
    return folder, expected, seen


def _check_greedy_texts(texts, expected):
    together, alone, in_pairs, without_cache = texts
    assert [completion.tokens for completion in together] == expected
    assert without_cache == expected
    assert together == alone == in_pairs
    assert [completion.prompt for completion in together] == list(PROMPTS)


def _check_seeded_texts(texts):
    seven, eight, seven_again = texts
    assert seven == seven_again
    assert seven != eight


def test_one_rank(saved):
    _, expected, (greedy, seeded) = saved
    _check_greedy_texts(greedy, expected)
    _check_seeded_texts(seeded)


@pytest.mark.distributed
def test_two_ranks(saved):
    folder, expected, _ = saved
    ranks = run_ranks(observe, 2, folder, 2, [greedy_texts, seeded_texts])
    for greedy, seeded in ranks:
        _check_greedy_texts(greedy, expected)
        _check_seeded_texts(seeded)
    assert ranks[0] == ranks[1]


@pytest.mark.distributed
def test_a_model_trained_with_sequence_parallelism(tmp_path):
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    config = tiny_config(tmp_path, parallel=parallel)
    on_two = run_ranks(save_and_observe, 2, config, [greedy_texts])
    ((on_one,),) = run_ranks(observe, 1, tmp_path, 1, [greedy_texts])
    expected = on_one[3]
    for texts in (on_one, *(texts for _, (texts,) in on_two)):
        _check_greedy_texts(texts, expected)


@pytest.mark.distributed
def test_a_model_trained_with_columns_over_data_parallel_neighbours(tmp_path):
    config = tiny_config(tmp_path)
    memory = dataclasses.replace(config.memory, parallel_size=2)
    ours, theirs = run_ranks(save_model, 2, dataclasses.replace(config, memory=memory))
    assert ours == theirs
    ((on_one,),) = run_ranks(observe, 1, tmp_path, 1, [greedy_texts])
    on_two = run_ranks(observe, 2, tmp_path, 2, [greedy_texts])
    for texts in (on_one, *(texts for (texts,) in on_two)):
        _check_greedy_texts(texts, ours)


def test_learned_positions(tmp_path):
    model = {"position_embedding_type": "learned_absolute", "normalization": "LayerNorm"}
    config = tiny_config(tmp_path, "dense", model=model)
    ((expected, (texts,)),) = run_ranks(save_and_observe, 1, config, [greedy_texts])
    _check_greedy_texts(texts, expected)


def _gaps(generator):
    """How far chosen tokens' logits, without a cache, are below the best ones, in their spread."""
    gaps = []
    for completion in generator.generate(PROMPTS, GREEDY):
        tokens = [*completion.prompt_tokens, *completion.tokens]
        logits = logits_without_cache(generator.model, tokens)[len(completion.prompt_tokens) - 1 :]
        chosen = torch.tensor(completion.tokens)
        logits = logits[: len(chosen)]
        gaps.append((logits.amax(-1) - logits.gather(1, chosen[:, None])[:, 0]) / logits.std())
    return torch.cat(gaps), {parameter.dtype for parameter in generator.model.parameters()}


def test_bf16_chooses_a_likeliest_token_within_rounding(tmp_path):
    """A logit is a sum of 32 products with a relative error of 2**-8 each, behind three layers that
    err alike: tokens within an eighth of the logits' spread of the best one count as its equals."""
    config = tiny_config(tmp_path, precision={"bf16": True})
    ((_, ((gaps, dtypes),)),) = run_ranks(save_and_observe, 1, config, [_gaps])
    assert dtypes == {torch.bfloat16}
    assert gaps.numel() > 2 * NUM_TOKENS
    assert gaps.max() < 0.125
    assert (gaps == 0).float().mean() > 0.9


def _save_and_read_in_fp8(config, folder):
    """Gaps as above; whether each table was read in fp8."""
    save_model(config)
    generator = load(folder, memory_fp8_values=True)
    gaps, _ = _gaps(generator)
    return gaps, [table.shadow is not None for table in generator.model.module.memory.tables()]


def test_values_in_fp8_choose_a_likeliest_token_within_rounding(tmp_path):
    """With the cache as without it: both read the same fp8 values."""
    config = tiny_config(tmp_path, precision={"bf16": True})
    ((gaps, read_in_fp8),) = run_ranks(_save_and_read_in_fp8, 1, config, tmp_path)
    assert read_in_fp8 == [True]
    assert gaps.numel() > 2 * NUM_TOKENS
    assert gaps.max() < 0.125
    assert (gaps == 0).float().mean() > 0.9


def _restricted_to_one_token(generator):
    return [
        _tokens(generator, how)
        for how in (
            GREEDY,
            sampling(top_k=1),
            sampling(temperature=0),
            sampling(top_p=1e-6),
            sampling(temperature=1e-6),
            # The logits divided by it are infinite; below, its reciprocal is in fp32.
            sampling(temperature=1e-38),
            sampling(temperature=5e-324),
        )
    ]


def _ranks_of_top_3(generator):
    """How many tokens are likelier than each chosen one."""
    ranks = []
    for completion in generator.generate(PROMPTS, sampling(top_k=3, temperature=3.0)):
        tokens = [*completion.prompt_tokens, *completion.tokens]
        logits = logits_without_cache(generator.model, tokens)[len(completion.prompt_tokens) - 1 :]
        for step, token in enumerate(completion.tokens):
            ranks.append(int((logits[step] > logits[step, token]).sum()))
    return set(ranks)


def _frequencies(generator, temperature):
    how = Sampling(temperature=temperature, num_tokens_to_generate=1)
    prompts = [PROMPTS[0]] * NUM_SAMPLES
    completions = generator.generate(prompts, how, max_batch_size=NUM_SAMPLES)
    chosen = [completion.tokens[0] if completion.tokens else END for completion in completions]
    counts = torch.bincount(torch.tensor(chosen), minlength=VOCAB)
    logits = logits_without_cache(generator.model, tokens_of(PROMPTS[0]))[-1]
    return counts / NUM_SAMPLES, (logits / temperature).softmax(-1)


def _ended_texts(generator):
    """Texts without an end, and those that a token of the first one's middle ends."""
    prompts = [tokens_of(prompt) for prompt in PROMPTS]

    def run(*ends, **options):
        engine = InferenceEngine(
            generator.model,
            vocab_size=VOCAB,
            padded_vocab_size=128,
            stop_tokens=ends,
            **options,
        )
        return engine.run(prompts, NUM_TOKENS, GREEDY, 8)

    endless = run()
    end = next(t for t in endless[0] if t not in endless[1])
    other = next(t for t in range(VOCAB) if not any(t in text for text in endless))
    return {
        "endless": endless,
        "end": end,
        "ended": run(end),
        "two ends": run(other, end),
        "never chosen": run(never_chosen=[end, VOCAB + 7]),
    }


def _texts(generator):
    longest = sampling(temperature=0, num_tokens_to_generate=POSITIONS - 2)
    return {
        "plain": generator.generate(["5 6"], GREEDY)[0],
        "document": generator.generate(["5 6"], GREEDY, prepend_eod=True)[0],
        "document without cache": greedy_without_cache(generator.model, [END, 5, 6]),
        "nothing": generator.generate([], GREEDY),
        "longest": generator.generate(["5 6"], longest)[0],
        "as long as there are positions": generator.generate(["5 6"], Sampling(temperature=0))[0],
    }


def _errors_of_prompts(generator):
    wrong = {
        "too long": (" ".join(["1"] * POSITIONS), GREEDY),
        "too many": ("1 2 3", sampling(num_tokens_to_generate=POSITIONS)),
        "word": ("word", GREEDY),
        "outside": (str(VOCAB), GREEDY),
        "top-k": ("1", sampling(top_k=VOCAB + 1)),
    }
    errors = {}
    for name, (prompt, how) in wrong.items():
        with pytest.raises(ConfigurationError) as raised:
            generator.generate(["1", prompt], how)
        errors[name] = str(raised.value)
    return errors


def _errors_of_a_broken_weight(generator):
    """Greedy and sampled: NaN is the "largest" logit of the one, and cannot be drawn from."""
    gain = next(p for name, p in generator.model.named_parameters() if "final_layernorm" in name)
    kept = gain[0].item()
    gain[0] = float("nan")
    errors = []
    for how in (GREEDY, sampling(temperature=1.0)):
        with pytest.raises(CheckpointError) as raised:
            generator.generate(["1 2", "3"], how)
        errors.append(str(raised.value))
    gain[0] = kept
    return errors


OBSERVED = {
    "broken": _errors_of_a_broken_weight,
    "one token": _restricted_to_one_token,
    "top 3": _ranks_of_top_3,
    "frequencies at 1": partial(_frequencies, temperature=1.0),
    "frequencies at 3": partial(_frequencies, temperature=3.0),
    "ended": _ended_texts,
    "texts": _texts,
    "errors": _errors_of_prompts,
}


@pytest.fixture(scope="module")
def memory_model(tmp_path_factory):
    """The folder of a saved memory+ model, and OBSERVED of it."""
    folder = tmp_path_factory.mktemp("memory")
    ((_, seen),) = run_ranks(save_and_observe, 1, tiny_config(folder), list(OBSERVED.values()))
    return folder, dict(zip(OBSERVED, seen, strict=True))


def test_what_restricts_the_choice_to_one_token_is_greedy(memory_model):
    texts = memory_model[1]["one token"]
    assert texts == [texts[0]] * 7


def test_logits_that_are_no_numbers_are_told(memory_model):
    for error in memory_model[1]["broken"]:
        assert "iter_" in error and "logits are no finite numbers" in error


def test_top_k_chooses_among_so_many(memory_model):
    assert memory_model[1]["top 3"] == {0, 1, 2}


@pytest.mark.parametrize("temperature", [1, 3])
def test_sampling_follows_the_softmax_at_the_temperature(memory_model, temperature):
    frequencies, expected = memory_model[1][f"frequencies at {temperature}"]
    assert frequencies.numel() == VOCAB, "the padding of the vocabulary is no token"
    deviation = (expected * (1 - expected) / NUM_SAMPLES).sqrt()
    assert ((frequencies - expected).abs() <= 5 * deviation + 1e-3).all()


def test_an_end_of_document_ends_its_own_text_only(memory_model):
    texts = memory_model[1]["ended"]
    endless, end, ended = (texts[name] for name in ("endless", "end", "ended"))
    assert all(len(text) == NUM_TOKENS for text in endless)
    assert ended == [text[: text.index(end)] if end in text else text for text in endless]
    assert len(ended[0]) < NUM_TOKENS == len(ended[1])
    assert texts["two ends"] == ended


def test_an_id_that_is_no_token_is_never_chosen(memory_model):
    texts = memory_model[1]["ended"]
    before = [text[: text.index(texts["end"])] for text in texts["endless"] if texts["end"] in text]
    assert not any(texts["end"] in text for text in texts["never chosen"])
    assert texts["never chosen"][0][: len(before[0])] == before[0]
    assert all(len(text) == NUM_TOKENS for text in texts["never chosen"])


def test_texts_and_lengths(memory_model):
    texts = memory_model[1]["texts"]
    plain, document, longest = texts["plain"], texts["document"], texts["longest"]
    assert plain.text == "".join(f" {token}" for token in plain.tokens)
    assert plain.prompt_tokens == (5, 6)
    assert plain.reached_end == (len(plain.tokens) < NUM_TOKENS)
    assert document.prompt_tokens == (END, 5, 6)
    assert document.tokens == texts["document without cache"]
    assert texts["nothing"] == []
    assert longest.tokens[:NUM_TOKENS] == plain.tokens
    assert texts["as long as there are positions"] == longest


def test_prompts_that_cannot_be_continued(memory_model):
    errors = memory_model[1]["errors"]
    assert f"has {POSITIONS} tokens" in errors["too long"]
    assert "shorten it to at most 47" in errors["too long"]
    assert "--num-tokens-to-generate 48" in errors["too many"]
    assert "give --num-tokens-to-generate 45 at most" in errors["too many"]
    assert "--prompt 'word'" in errors["word"] and "token numbers" in errors["word"]
    assert "60" in errors["outside"] and "0 to 59" in errors["outside"]
    assert "--top-k 61 exceeds" in errors["top-k"]
