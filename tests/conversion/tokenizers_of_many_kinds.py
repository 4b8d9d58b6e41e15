"""Small Hugging Face tokenizers of many kinds, made here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

EXAMPLE = Path(__file__).parents[2] / "examples" / "data" / "tokenizer"
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "In 1984 the club had 12,500 members and 3 memories of rivers.",
    "Ünïcode über ﬁne ½ Съешь ещё этих мягких французских булок 中文 日本語",
    "def f(x):\n    return x ** 2  # why?\n\n\n  and so on",
] * 20


def _save(folder: Path, tokenizer: Tokenizer, **settings) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _bpe(pre_tokenizer, normalizer=None, size: int = 400) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|pad|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


_PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}


def _digits_in_threes(folder: Path) -> None:
    """Llama 3's way of splitting, which transformers 5 replaces for the type qwen2."""
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    steps = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    _save(folder, _bpe(steps), **_PLAIN, pad_token="<|pad|>")


def _like_qwen2(folder: Path) -> None:
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    steps = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    _save(
        folder,
        _bpe(steps, normalizers.NFC()),
        tokenizer_class="Qwen2Tokenizer",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
    )


def _prefix_space(folder: Path) -> None:
    """transformers 4 takes the prefix away unless a setting says it."""
    _save(folder, _bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)), **_PLAIN)


def _normalizing(folder: Path) -> None:
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    _save(folder, _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer), **_PLAIN)


def _added_tokens(folder: Path) -> None:
    """Special and not, with each flag, and a hole before the last."""
    tokenizer = _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.add_tokens(
        [
            AddedToken("EUR", single_word=True, normalized=False),
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("Normal", normalized=True),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("<|tool|>", normalized=False)])
    _save(folder, tokenizer, **_PLAIN, extra_special_tokens=["<|tool|>"])


def _with_template(folder: Path) -> None:
    """A beginning and an end around each text, by settings and by the file."""
    tokenizer = _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    end = ("<|endoftext|>", 0)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[end]
    )
    _save(
        folder,
        tokenizer,
        **_PLAIN,
        bos_token="<|endoftext|>",
        add_bos_token=True,
        add_eos_token=False,
    )


def _of_llamas_class(folder: Path, declared: str = "LlamaTokenizer") -> None:
    """tokenizer.json as Llama 2 has it; transformers 5 writes another normalizer."""
    _train_sentencepiece(folder, model_type="bpe")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    _save(folder, tokenizer, tokenizer_class=declared, bos_token="<s>", eos_token="</s>")


def _train_sentencepiece(folder: Path, **options) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    (folder / "tokenizer.vocab").unlink()


def _only_sentencepiece(folder: Path) -> None:
    """No tokenizer.json: transformers makes one, each version its own."""
    _train_sentencepiece(folder, model_type="bpe", normalization_rule_name="identity")
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _without_settings(folder: Path) -> None:
    """tokenizer.json alone: transformers 5 goes by config.json."""
    _digits_in_threes(folder)
    (folder / "tokenizer_config.json").unlink()


KINDS: dict[str, Callable[[Path], object]] = {
    "example": lambda folder: shutil.copytree(EXAMPLE, folder),
    "digits-in-threes": _digits_in_threes,
    "like-qwen2": _like_qwen2,
    "prefix-space": _prefix_space,
    "normalizing": _normalizing,
    "added-tokens": _added_tokens,
    "with-template": _with_template,
    "of-llamas-class": _of_llamas_class,
    "only-sentencepiece": _only_sentencepiece,
    "without-settings": _without_settings,
}
"""Name to a function that writes the folder."""
