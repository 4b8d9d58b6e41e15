"""Is the tokenizer beside a converted model the one that it was trained with?"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_memory.conversion.tokenizer_files import definition, load_tokenizer, tokenizer_files
from megatron_memory.data.tokenizer_hash import PROBE_TEXTS
from megatron_memory.exceptions import CheckpointError
from megatron_memory.reading.panics import panics_as_errors

Encode = Callable[[str], Sequence[int]]

TEXTS = (
    *PROBE_TEXTS,
    "The currency code of Japan is JPY.",
    " two  spaces,\ta tab\nand lines\r\n\n",
    "In 1984 the club had 12,500 members; 3.14e-5, 1st, x2y, 007.",
    "Ünïcode: ☃ ½ ﬁ e\u0301 \u00a0 \u200b 🙂 👩‍👩‍👧 🇯🇵",
    "Съешь ещё этих мягких французских булок",
    "Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία",
    "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣",
    "דג סקרן שט בים מאוכזב",
    "ऋषियों को सताने वाले १२३ राक्षसों",
    "ไทยไม่มีช่องว่าง 中文没有空格，日本語も。한국어는 있다.",
    "ACRONYMs camelCase snake_case don't WE'RE I'll ＦＵＬＬ ｗｉｄｔｈ",
    "x",
    " ",
    "   leading and trailing   ",
    "tabs\t\tand\n\n\nblank lines \n  indented",
    "<s>[INST] <|im_start|>user<|im_end|> <unk> <pad> </s>",
)
"""Texts of many scripts, spaces, digits, and what looks like special tokens."""

_ROLES = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"),
    *("sep_token_id", "cls_token_id", "mask_token_id"),
    *("chat_template", "model_max_length", "padding_side", "truncation_side"),
    "clean_up_tokenization_spaces",
)


def check_same_tokenizer(original: Path, folder: Path, kind: str | None) -> str | None:
    """Hold the tokenizer of a converted folder to the original.

    Args:
        original: the training's tokenizer, a folder or a file.
        folder: with the copy, and where it is a model's folder with its config.json.
        kind: --tokenizer-type of the training.

    Returns:
        what was compared; None where there is no copy that could be.

    Raises:
        CheckpointError: names the difference.
    """
    if original.is_dir():
        return _check_same_folder(original, folder)
    copy = folder / original.name
    if copy.is_file():
        if copy.read_bytes() != original.read_bytes():
            raise CheckpointError(f"{copy} is not the file that {original} is")
        return f"the bytes of {original.name}"
    if original.suffix == ".model" and tokenizer_files(folder):
        copied = load_tokenizer(folder)
        _check_ids(_sentencepiece(original), _encoder(copied, special=False), folder, TEXTS)
        return f"ids of {len(TEXTS)} texts in many scripts"
    return None


def _check_same_folder(original: Path, folder: Path) -> str | None:
    if not tokenizer_files(folder):
        return None
    one, another = load_tokenizer(original), load_tokenizer(folder)
    theirs, ours = definition(one), definition(another)
    if theirs is not None and ours != theirs:
        differing = sorted(
            name for name in theirs if ours is None or theirs[name] != ours.get(name)
        )
        raise CheckpointError(_refusal(folder, f"its {', '.join(differing)} differ"))
    roles = [name for name in _ROLES if getattr(one, name, None) != getattr(another, name, None)]
    if roles:
        raise CheckpointError(_refusal(folder, f"its {', '.join(roles)} differ"))
    texts = [*TEXTS, *_around_added(one)]
    for special in (False, True):
        _check_ids(
            _encoder(one, special=special), _encoder(another, special=special), folder, texts
        )
    return f"ids of {len(texts)} texts in many scripts, and special tokens"


def _around_added(tokenizer: Any) -> Iterator[str]:
    """Added tokens where their flags matter: alone, within a word, between spaces."""
    for token in list(map(str, tokenizer.get_added_vocab()))[:50]:
        yield f"a{token}b {token} {token}{token}, {token.upper()}"


def _encoder(tokenizer: Any, *, special: bool) -> Encode:
    return lambda text: tokenizer.encode(text, add_special_tokens=special)


def _sentencepiece(file: Path) -> Encode:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(file)).encode


def _check_ids(one: Encode, another: Encode, folder: Path, texts: Sequence[str]) -> None:
    for text in texts:
        expected, found = _ids(one, text), _ids(another, text)
        if expected != found:
            raise CheckpointError(_refusal(folder, f"{text!r} has the ids {found}, not {expected}"))


def _ids(encode: Encode, text: str) -> list[int] | str:
    """Of a text, or how it is refused: the copy must refuse what the original refuses."""
    try:
        with panics_as_errors():
            return list(encode(text))
    # Libraries raise nearly anything on a text that they refuse.
    except Exception as error:
        return f"of none ({type(error).__name__}: {error})"


def _refusal(folder: Path, reason: str) -> str:
    return (
        f"{folder}: transformers makes another tokenizer of the copy than of the training's: "
        f"{reason}. Give a tokenizer folder with --tokenizer-model that it reads alike"
    )
