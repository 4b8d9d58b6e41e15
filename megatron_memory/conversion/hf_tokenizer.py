"""The tokenizer of an exported folder: Hugging Face's own copied, SentencePiece's rebuilt for
transformers and probed, others named."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_memory.conversion.saved_state import SavedState
from megatron_memory.conversion.tokenizer_files import (
    SETTINGS,
    copy_tokenizer,
    force_definition,
    load_tokenizer,
    read_settings,
    tokenizer_files,
    write_settings,
)
from megatron_memory.data.tokenizers import num_ids_of
from megatron_memory.exceptions import CheckpointError

Tokens = dict[str, int | None]

_NO_TOKENS: Tokens = {"bos_token_id": None, "eos_token_id": None}
# As data.tokenizers defines them.
_BYTE_TOKENS: Tokens = {"bos_token_id": 256, "eos_token_id": 257}
_PROBES = (
    "The currency code of Japan is JPY.",
    " two  spaces,\ta tab\nand lines\r\n\n",
    "Ünïcode: ☃ 日本語 العربية ½ ﬁ e\u0301 \u00a0 \u200b 🙂",
    "def f(x):\n    return x**2 - 3.14e-5  # 1,000,000",
    "x",
    " ",
    "",
)
_NUM_RANDOM_PROBES = 200
_INPUTS = ["input_ids", "attention_mask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedTokenizer:
    """What of a tokenizer came into a folder."""

    special_tokens: Tokens
    """Begin and end, for config.json and generation_config.json."""
    is_there: bool
    """Whether transformers can read it from the folder."""
    note: str | None = None
    """For the user."""


def write_tokenizer(state: SavedState, folder: Path, model_type: str) -> ExportedTokenizer:
    """Write the tokenizer of a model, in a form that `AutoTokenizer` reads.

    Args:
        state: the model.
        folder: of the model.
        model_type: its family's, which decides how transformers reads a tokenizer.

    Raises:
        CheckpointError: it cannot be read.
        OSError: the folder cannot be written.
    """
    tokenizer, kind = state.tokenizer, state.config.data.tokenizer_type
    if tokenizer is None and kind == "ByteLevelTokenizer":
        note = (
            "the tokens are UTF-8's bytes, 256 begins and 257 ends a document: transformers has no "
            "such tokenizer, and none is written"
        )
        return ExportedTokenizer(special_tokens=_BYTE_TOKENS, is_there=False, note=note)
    if tokenizer is None:
        note = "no tokenizer is at hand; name its folder with --tokenizer-model"
        return ExportedTokenizer(special_tokens=_NO_TOKENS, is_there=False, note=note)
    if tokenizer_files(tokenizer):
        original = load_tokenizer(tokenizer)
        copy_tokenizer(tokenizer, folder, model_type)
        _name_inputs(folder)
        tokens = {name: getattr(original, name) for name in _NO_TOKENS}
        ids = num_ids_of(original.get_vocab())
        beyond: str | None = None
        if ids > state.vocab_size:
            beyond = (
                f"the tokenizer has ids up to {ids - 1}, and the model rows for {state.vocab_size} "
                "tokens: transformers fails on texts with the others"
            )
        return ExportedTokenizer(special_tokens=tokens, is_there=True, note=beyond)
    if tokenizer.suffix == ".model":
        return _write_sentencepiece(tokenizer, folder, model_type)
    note = f"{tokenizer}: transformers does not read such a tokenizer, and none is written"
    return ExportedTokenizer(special_tokens=_NO_TOKENS, is_there=False, note=note)


def _name_inputs(folder: Path) -> None:
    """Say what a decoder takes: transformers 4 gives it token types too, which it refuses."""
    if (folder / SETTINGS).is_file():
        write_settings(folder, {"model_input_names": _INPUTS} | read_settings(folder))


def _write_sentencepiece(file: Path, folder: Path, model_type: str) -> ExportedTokenizer:
    """tokenizer.json for a SentencePiece model, if it gives the same tokens.

    transformers' own classes for such models presume Llama's normalization, whatever the model
    says.
    """
    import sentencepiece

    try:
        original = sentencepiece.SentencePieceProcessor(model_file=str(file))
        rebuilt = _rebuilt(file.read_bytes())
    # Of protobuf, SentencePiece and tokenizers: nearly anything on a damaged file.
    except Exception as error:
        raise CheckpointError(f"{file}: is no SentencePiece model: {error}") from error
    special = {"bos_token_id": original.bos_id(), "eos_token_id": original.eos_id()}
    tokens: Tokens = {name: number if number >= 0 else None for name, number in special.items()}
    for text in _probes(original):
        if rebuilt is None or rebuilt.encode(text).ids != original.encode(text):
            note = f"{file}: transformers would tokenize {text!r} otherwise, and none is written"
            return ExportedTokenizer(special_tokens=tokens, is_there=False, note=note)
    rebuilt.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {
        name.removesuffix("_id"): original.id_to_piece(number)
        for name, number in tokens.items()
        if number is not None
    }
    settings |= {"clean_up_tokenization_spaces": False, "model_input_names": _INPUTS}
    force_definition(folder, settings, model_type)
    write_settings(folder, settings)
    return ExportedTokenizer(special_tokens=tokens, is_there=True)


def _probes(original: Any) -> Iterator[str]:
    """Texts that try out normalization, bytes, and the vocabulary's own words."""
    yield from _PROBES
    generator = random.Random(0)
    words = [
        number
        for number in range(original.vocab_size())
        if not (original.is_control(number) or original.is_byte(number))
        and not (original.is_unknown(number) or original.is_unused(number))
    ]
    for _ in range(_NUM_RANDOM_PROBES):
        yield original.decode(generator.choices(words, k=12))


def _rebuilt(model: bytes) -> Any:
    """The same tokenizer by the library that transformers uses, or None of a kind that it lacks."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kinds = type(proto.pieces[0])
    tokenizer_model = _model(proto)
    if tokenizer_model is None or any(p.type == kinds.USER_DEFINED for p in proto.pieces):
        return None
    tokenizer = Tokenizer(tokenizer_model)
    tokenizer.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    control = [p.piece for p in proto.pieces if p.type == kinds.CONTROL]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    return tokenizer


def _model(proto: Any) -> Any:
    from tokenizers import models

    trainer = proto.trainer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == trainer.UNIGRAM:
        return models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    if trainer.model_type != trainer.BPE:
        return None
    vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
    # SentencePiece joins the pair whose piece has the highest score, tokenizers the first listed.
    merges = [
        (score, piece[:cut], piece[cut:])
        for piece, score in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort(key=lambda merge: (-merge[0], vocab[merge[1]], vocab[merge[2]]))
    return models.BPE(
        vocab,
        [(left, right) for _, left, right in merges],
        unk_token=pieces[trainer.unk_id][0],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _normalizers(spec: Any) -> list[Any]:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return [*steps, normalizers.Replace(" ", "▁")]
