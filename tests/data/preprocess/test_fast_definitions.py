"""gigatoken is used only where it gives the ids of the tokenizers library, option by option.

Every definition goes through `FastEncoder`, as in production. What is accepted is compared on texts
made against it; what is refused is refused with its reason, and where gigatoken would have read it
without a word, it is shown to give other ids.
"""

import json
import random
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from megatron_memory.data.preprocess import unicode_versions
from megatron_memory.data.preprocess.fast_bpe import FastEncoder, TokenMismatch
from megatron_memory.data.preprocess.fast_definitions import SPLITS
from megatron_memory.data.preprocess.tokenizer import TextTokenizer
from tests.soak.rounds import rounds

TRAINED_ON = [
    "the quick brown fox jumps over the lazy dog EUR NEUROSIS EUROPE",
    "It's a naïve café, don't you think? 12345 67 8 don'T I'LL Hello hello World WORLD",
    "    indented  code\n\n\tdef f(x):\r\n   return x**2 # WHY?",
    "中文 日本語 العربية हिन्दी русский ÀÉÎ àéî ﬁ ① Ⅷ",
] * 5
PIECES = [
    *("the", " the", "The", " quick", "EUR", "EURO", " EUR ", "NEUROSIS", "K", "aB", "hello"),
    *(
        " ",
        "  ",
        "   ",
        "\n",
        "\r\n",
        "\t",
        "\n\n",
        " \n",
        "\xa0",
        "\u3000",
        "\x85",
        "\x1c",
        "\u2028",
    ),
    *("'s", "'S", "'ll", "'LL", "'re", "’s", "'ſ", "1", "12", "123", "12345", "٣", "²", "Ⅷ"),
    *("中文", "日本語", "é", "e\u0301", "\u0301\u0323", "ﬁ", "\u200b", "\ufeff", "\u180e", "\x00"),
    *("_", "-", "--", "...", "!?", "🙂", "👨‍👩‍👧", "İ", "ß", "ǆ", "Å", "\u212b", "Ω", "\u2126"),
    *("<", "|", ">", "<s>", " <s>", "<s> ", "\n<s>", "<t>", "\u2581", "\u2581\u2581", "<0x0A>"),
    # Letters and marks of Unicode 10, 13, 14, 16 and 17.
    *("\u1df6", "\u0d3b", "\u0898", "\u08cb", "\u0897", "\ua7cb", "\u088f", "\U00010940", "\u1acf"),
]


def texts(number: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    mixed = ["".join(generator.choices(PIECES, k=generator.randrange(1, 9))) for _ in range(number)]
    low = ["".join(chr(generator.randrange(0x3000)) for _ in range(5)) for _ in range(number // 4)]
    return ["", *PIECES, *mixed, *low]


TEXTS = texts(rounds(20_000))


def byte_level(pre_tokenizer=None, normalizer=None, **model) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    return tokenizer


def split(pattern: str, behavior: str = "isolated", invert: bool = False, **byte_level_options):
    options = {"add_prefix_space": False, "use_regex": False} | byte_level_options
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior, invert),
            pre_tokenizers.ByteLevel(**options),
        ]
    )


def with_bytes(normalizer=None, pre_tokenizer=None) -> Tokenizer:
    """Of the kind of Llama 2: a byte that no token has is a token of its own."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    return tokenizer


def add(tokenizer: Tokenizer, *tokens: AddedToken, special: bool = False) -> Tokenizer:
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(tokens))
    return tokenizer


def token(content: str, **flags) -> AddedToken:
    return AddedToken(content, **{"normalized": False} | flags)


def edited(tokenizer: Tokenizer, edit: Callable[[dict], None]) -> Tokenizer:
    definition = json.loads(tokenizer.to_str())
    edit(definition)
    return Tokenizer.from_str(json.dumps(definition))


def model(**options) -> Callable[[dict], None]:
    return lambda definition: definition["model"].update(options)


def as_loaded(tokenizer: Tokenizer) -> TextTokenizer:
    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return TextTokenizer(
        encode=encode,
        decode=tokenizer.decode,
        vocab_size=tokenizer.get_vocab_size(),
        eod=None,
        hash="",
        definition=tokenizer.to_str(),
    )


QWEN, LLAMA_3 = SPLITS["Qwen 2"], SPLITS["Llama 3"]
PREPEND, REPLACE = normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")
PREFIX_SPACE = pre_tokenizers.ByteLevel(add_prefix_space=True)
METASPACES = {
    f"Metaspace {scheme} {is_split}": lambda scheme=scheme, is_split=is_split: with_bytes(
        None, pre_tokenizers.Metaspace(prepend_scheme=scheme, split=is_split)
    )
    for scheme in ("first", "always", "never")
    for is_split in (True, False)
}
ACCEPTED = {
    "GPT-2": byte_level,
    "trim_offsets": lambda: byte_level(pre_tokenizers.ByteLevel(False, trim_offsets=False)),
    "prefix space": lambda: add(byte_level(PREFIX_SPACE), token("<s>")),
    **{name: lambda p=pattern: byte_level(split(p)) for name, pattern in SPLITS.items()},
    "NFC": lambda: add(byte_level(split(QWEN), normalizers.NFC()), token("e\u0301"), token("<s>")),
    "NFC in a sequence": lambda: byte_level(None, normalizers.Sequence([normalizers.NFC()])),
    "NFC and a normalized token": lambda: add(
        byte_level(None, normalizers.NFC()), token("<s>", normalized=True)
    ),
    "no normalizers in a sequence": lambda: byte_level(None, normalizers.Sequence([])),
    "special": lambda: add(byte_level(), token("<s>"), token(">"), special=True),
    "lstrip": lambda: add(byte_level(), token("<s>", lstrip=True), token("<t>", lstrip=True)),
    "rstrip": lambda: add(byte_level(split(QWEN)), token("<s>", rstrip=True), token("<t>")),
    "both": lambda: add(
        byte_level(None, normalizers.NFC()), token("<s>", rstrip=True, lstrip=True), token("<t>")
    ),
    "normalized": lambda: add(byte_level(), token("<s>"), token("hello", normalized=True)),
    "overlaps in one pass": lambda: add(
        byte_level(), token("EUR"), token("EURO"), token("UROS"), token("<"), token("<s>")
    ),
    "tokens with spaces": lambda: add(byte_level(), token("  "), token("\n"), token(" EUR")),
    "tokens of the vocabulary": lambda: add(byte_level(), token("the"), token("Ġthe")),
    "tokens beyond ASCII": lambda: add(byte_level(), token("中"), token("e\u0301"), token("🙂")),
    "an id that the library gives": lambda: edited(
        add(byte_level(), token("<s>")), lambda d: d["added_tokens"][1].update(id=5000)
    ),
    "ignore_merges": lambda: edited(
        byte_level(),
        lambda d: (d["model"].update(ignore_merges=True), d["model"]["vocab"].update(EURO=400)),
    ),
    "an entry that no merge makes": lambda: edited(
        byte_level(), lambda d: d["model"]["vocab"].update(EURO=450)
    ),
    "dropout 0": lambda: edited(byte_level(), model(dropout=0.0)),
    "unk_token": lambda: edited(byte_level(), model(unk_token="<|endoftext|>", fuse_unk=True)),
    "empty prefix and suffix": lambda: edited(
        byte_level(), model(continuing_subword_prefix="", end_of_word_suffix="")
    ),
    "merges backwards": lambda: edited(
        byte_level(), lambda d: d["model"].update(merges=d["model"]["merges"][::-1])
    ),
    "a merge listed twice": lambda: edited(
        byte_level(), lambda d: d["model"]["merges"].insert(3, d["model"]["merges"][40])
    ),
    "ids in another order": lambda: edited(byte_level(), _shuffle_ids),
    "Llama 2": lambda: add(with_bytes(normalizers.Sequence([PREPEND, REPLACE])), token("<s>")),
    "Llama 2, normalized": lambda: add(
        with_bytes(normalizers.Sequence([PREPEND, REPLACE])), token("<s>", normalized=True)
    ),
    "Llama 2, strip": lambda: add(
        with_bytes(normalizers.Sequence([PREPEND, REPLACE])), token("<s>", lstrip=True, rstrip=True)
    ),
    "Llama 2, the other way": lambda: with_bytes(normalizers.Sequence([REPLACE, PREPEND])),
    "Replace": lambda: with_bytes(REPLACE),
    "Prepend": lambda: with_bytes(PREPEND),
    "nothing before": with_bytes,
    "Gemma": lambda: with_bytes(REPLACE, pre_tokenizers.Split(" ", "merged_with_previous")),
    **METASPACES,
}


def _shuffle_ids(definition: dict) -> None:
    vocab = definition["model"]["vocab"]
    ids = list(vocab.values())
    random.Random(1).shuffle(ids)
    vocab.update(zip(list(vocab), ids, strict=True))
    for added in definition["added_tokens"]:
        added["id"] = vocab[added["content"]]


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_gives_the_same_ids(name: str):
    tokenizer = as_loaded(ACCEPTED[name]())
    ids, lengths = FastEncoder(tokenizer, [])(TEXTS)
    expected = tokenizer.encode(TEXTS)
    ends = lengths.cumsum()
    for text, wanted, end, length in zip(TEXTS, expected, ends, lengths, strict=True):
        assert ids[end - length : end].tolist() == wanted, ascii(text)


REFUSED = {
    "single_word": (lambda: add(byte_level(), token("EUR", single_word=True)), "'EUR' with single"),
    "single_word special": (
        lambda: add(byte_level(), token("<s>", single_word=True), special=True),
        "'<s>' with single_word",
    ),
    "dropout": (lambda: edited(byte_level(), model(dropout=0.5)), "model's dropout 0.5"),
    "suffix": (
        lambda: edited(byte_level(), model(end_of_word_suffix="</w>")),
        "model's end_of_word_suffix '</w>'",
    ),
    "removed": (lambda: byte_level(split(QWEN, "removed")), "with the pre-tokenizer .*'Removed'"),
    "contiguous": (lambda: byte_level(split(QWEN, "contiguous")), "pre-tokenizer .*'Contiguous'"),
    "split, prefix space": (
        lambda: byte_level(split(QWEN, add_prefix_space=True)),
        "pre-tokenizer .*'add_prefix_space': True",
    ),
    "no split": (
        lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        "pre-tokenizer .*'use_regex': False",
    ),
    "no pre-tokenizer": (
        lambda: edited(byte_level(), lambda d: d.update(pre_tokenizer=None)),
        r"pre-tokenizer \(none\)",
    ),
    "NFC and a token that it changes": (
        lambda: add(byte_level(None, normalizers.NFC()), token("e\u0301", normalized=True)),
        "with normalized, which the normalizer changes",
    ),
    "overlaps of two passes": (
        lambda: add(byte_level(), token("EUR", normalized=True), token("URO")),
        "'EUR' with normalized, which overlaps 'URO'",
    ),
    "spaces for two": (
        lambda: add(byte_level(), token("  "), token("<s>", rstrip=True)),
        "'<s>' with lstrip or rstrip beside '  '",
    ),
    "truncation": (lambda: _with_truncation(byte_level()), "truncation"),
    "padding": (lambda: _with_padding(byte_level()), "padding"),
}
"""gigatoken reads all of them, and gives other ids for some text."""
OTHERS_REFUSED = {
    "invert": (lambda: byte_level(split(QWEN, "isolated", True)), "pre-tokenizer .*'invert': True"),
    "merged": (lambda: byte_level(split(QWEN, "merged_with_next")), "MergedWithNext"),
    "regex twice": (lambda: byte_level(split(QWEN, use_regex=True)), "'use_regex': True"),
    "another pattern": (lambda: byte_level(split(r"\s+|\S+")), "pre-tokenizer"),
    "digits": (
        lambda: byte_level(
            pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(False)])
        ),
        "pre-tokenizer .*Digits",
    ),
    **{
        name: (
            lambda n=name: byte_level(None, getattr(normalizers, n)()),
            f"the normalizer .*{name}",
        )
        for name in ("NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip")
    },
    "NFC twice": (
        lambda: byte_level(None, normalizers.Sequence([normalizers.NFC(), normalizers.NFC()])),
        "the normalizer",
    ),
    "byte_fallback of byte-level": (
        lambda: edited(byte_level(), model(byte_fallback=True)),
        "byte_fallback without the token <0x00>",
    ),
    "Llama 2, NFKC": (
        lambda: with_bytes(normalizers.Sequence([normalizers.NFKC(), REPLACE])),
        "the normalizer .*NFKC",
    ),
    "another mark": (
        lambda: with_bytes(None, pre_tokenizers.Metaspace(replacement="_")),
        "pre-tokenizer .*Metaspace",
    ),
    "WordPiece": (
        lambda: Tokenizer(models.WordPiece({"a": 0, "?": 1}, unk_token="?")),
        "WordPiece",
    ),
    "a token for the unknown that is none": (
        lambda: edited(byte_level(), model(unk_token="<unk>")),
        "unk_token '<unk>', which its vocabulary lacks",
    ),
    "Unigram": (lambda: Tokenizer(models.Unigram([("a", 0.0)])), "a model Unigram"),
}


def _with_truncation(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.enable_truncation(4)
    return tokenizer


def _with_padding(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.enable_padding(length=8)
    return tokenizer


@pytest.mark.parametrize("name", [*REFUSED, *OTHERS_REFUSED])
def test_refused_says_why(name: str):
    make, reason = (REFUSED | OTHERS_REFUSED)[name]
    with pytest.raises(TokenMismatch, match=f"^gigatoken is not known to honour .*{reason}"):
        FastEncoder(as_loaded(make()), [])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_would_have_been_wrong(name: str):
    from gigatoken.gigatoken_rs import load_hf_json

    tokenizer = as_loaded(REFUSED[name][0]())
    backend = load_hf_json(tokenizer.definition)
    may_differ = unicode_versions.VersionedCharacters(categories=True, normalization=True)
    known = [text for text in TEXTS if not may_differ(text)]
    expected = tokenizer.encode(known)
    assert any(
        backend.encode(text).tolist() != ids for text, ids in zip(known, expected, strict=True)
    )


def test_other_versions_are_not_trusted(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.10.9")
    with pytest.raises(TokenMismatch, match=r"version 0.10.9 was not examined, only 0\.10\.0"):
        FastEncoder(as_loaded(byte_level()), [])


def merging_over_borders() -> dict:
    """A byte-level vocabulary that shows where a text was split: ASCII merges with all others."""
    names = {b: c for c, b in _byte_symbols().items()}
    vocab = {names[byte]: byte for byte in range(256)}
    merges = []
    ascii_names = [names[ord(c)] for c in "a1. \n'"]
    leads, ends = ([names[b] for b in r] for r in (range(0xC2, 0xF5), range(0x80, 0xC0)))
    pairs = [(a, lead) for a in ascii_names for lead in leads]
    pairs += [(end, a) for end in ends for a in ascii_names]
    pairs += [(end, lead) for end in ends for lead in leads]
    for pair in pairs:
        vocab["".join(pair)] = len(vocab)
        merges.append(pair)
    return {"vocab": vocab, "merges": merges}


def _byte_symbols() -> dict[str, int]:
    """GPT-2's: printable bytes for themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer", "patterns"),
    [
        (split(QWEN), None, ("a%sa", "1%s1", ".%s.", " %s ", "\n%s\n", "'%ss", "'%s")),
        (split(LLAMA_3), None, ("a%sa", "1%s1", ".%s.")),
        (None, normalizers.NFC(), ("a%s\u0301", "e\u0301%s", "%s\u0323", "%s%sx\u0327%s\u0301")),
    ],
    ids=["Qwen 2", "Llama 3", "NFC"],
)
def test_characters_are_split_and_normalized_alike(pre_tokenizer, normalizer, patterns):
    """A share of all characters; in `make test-slow` all. Those that differ go their own way."""
    tokenizer = Tokenizer(models.BPE(**merging_over_borders()))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    loaded = as_loaded(tokenizer)
    encoder = FastEncoder(loaded, [])
    characters = [chr(c) for c in range(0x80, 0x40000) if not 0xD800 <= c < 0xE000]
    some = random.Random(2).sample(characters, rounds(len(characters)) // 10)
    newer = {
        c for ranges in (unicode_versions._SPLIT, unicode_versions._NORMALIZED) for c in ranges
    }
    some += [chr(c) for first, last in newer for c in range(max(0x80, first - 1), last + 2)]
    for pattern in patterns:
        batch = [pattern.replace("%s", character) for character in some]
        ids, lengths = encoder(batch)
        expected = loaded.encode(batch)
        assert ids.tolist() == [number for wanted in expected for number in wanted]
        assert lengths.tolist() == list(map(len, expected))


def test_only_texts_with_such_characters_go_their_own_way():
    may_differ = unicode_versions.VersionedCharacters(categories=True, normalization=True)
    for text in ("", "ascii", "naïve café 中文 हिन्दी \U0001f600 \u0301 \ue000"):
        assert not may_differ(text)
    for text in ("a\u088f", "中\U00010940", "\u1df6", "\u0378", "\U000e0fff"):
        assert may_differ(text)
    nothing = unicode_versions.VersionedCharacters(categories=False, normalization=False)
    assert not nothing("a\u088f")
