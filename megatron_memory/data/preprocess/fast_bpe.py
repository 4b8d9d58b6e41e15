"""gigatoken in place of the Hugging Face tokenizer, held to give the same ids."""

import json
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from megatron_memory.data.preprocess.fast_definitions import (
    normalizes,
    splits_by_categories,
    why_not_fast,
)
from megatron_memory.data.preprocess.tokenizer import TextTokenizer
from megatron_memory.data.preprocess.unicode_versions import VersionedCharacters
from megatron_memory.data.tokenizer_hash import PROBE_TEXTS
from megatron_memory.exceptions import DataError

# A document's ids come as a row of a matrix that is as wide as the longest document. Documents are
# encoded together while their bytes, padded, are at most so many times the bytes.
_PADDED_PER_BYTE = 16
_PADDED_AT_LEAST = 1 << 16

_PIECE_CHARACTERS = 2000
_SAMPLED_SHARE = 1 / 1000


class TokenMismatch(DataError):
    """gigatoken and the tokenizer differ on a text, or may differ."""


class FastEncoder:
    """Texts to ids by gigatoken, where it is known to honour the tokenizer's definition.

    Texts with characters that the two libraries' versions of Unicode know differently are left to
    the tokenizer itself. One byte in a thousand of the others is encoded by it too, for comparison.
    That takes a few hundredths of the time.
    """

    def __init__(self, tokenizer: TextTokenizer, texts: Iterable[str]) -> None:
        """
        Args:
            tokenizer: with a definition.
            texts: of the input, to compare both on, besides the probes that are always made.

        Raises:
            TokenMismatch: gigatoken is not known to honour the definition, or gives other ids.
        """
        # The package's own Tokenizer loads all that its other ways of use need.
        from gigatoken.gigatoken_rs import BytesSource, PadTruncate, load_hf_json

        assert tokenizer.definition is not None
        definition = json.loads(tokenizer.definition)
        if reason := why_not_fast(definition):
            raise TokenMismatch(f"gigatoken is not known to honour {reason}")
        self._may_differ = VersionedCharacters(
            categories=splits_by_categories(definition), normalization=normalizes(definition)
        )
        self._bytes_source = BytesSource
        self._options = PadTruncate(0)
        try:
            self._backend = load_hf_json(tokenizer.definition)
        # ValueError for what it does not support; its own kinds for what it cannot parse.
        except Exception as error:
            raise TokenMismatch(f"gigatoken cannot read this tokenizer ({error})") from error
        self._reference: Callable[[list[str]], list[list[int]]] = tokenizer.encode
        self._credit = 0.0
        for text in (*PROBE_TEXTS, *texts):
            self._compare(text[:_PIECE_CHARACTERS])

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts.

        Returns:
            their ids, one after the other, [tokens] uint32; tokens of each text, [texts] int64.

        Raises:
            TokenMismatch: the tokenizer itself gives other ids for one of them.
            UnicodeEncodeError: a text is not Unicode (lone surrogates).
        """
        own = [i for i, text in enumerate(texts) if self._may_differ(text)]
        if not own:
            return self._encode(texts)
        ids, lengths = self._encode([text for text in texts if not self._may_differ(text)])
        rest = iter(np.split(ids, np.cumsum(lengths)[:-1]))
        by_itself = dict(zip(own, self._reference([texts[i] for i in own]), strict=True))
        pieces = [
            np.asarray(by_itself[i], dtype=np.uint32) if i in by_itself else next(rest)
            for i in range(len(texts))
        ]
        return np.concatenate(pieces), np.array(list(map(len, pieces)), dtype=np.int64)

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        parts, lengths = [], []
        for group in _groups([text.encode() for text in texts]):
            # As a BytesSource: a plain list makes gigatoken import awkward, half a second of work.
            matrix, length = self._backend.encode_batch_padded(
                self._bytes_source(group), self._options, parallel=False
            )
            parts.append(matrix[np.arange(matrix.shape[1]) < length[:, None]])
            lengths.append(length)
        self._sample(texts)
        return np.concatenate(parts), np.concatenate(lengths)

    def _sample(self, texts: list[str]) -> None:
        self._credit += _SAMPLED_SHARE * sum(map(len, texts))
        for text in texts:
            piece = text[:_PIECE_CHARACTERS]
            if self._credit < len(piece):
                return
            self._credit -= len(piece)
            self._compare(piece)

    def _compare(self, text: str) -> None:
        if self._may_differ(text):
            return
        try:
            expected = self._reference([text])[0]
        except TypeError:
            return  # The text is refused, which is for the document's turn to say.
        # gigatoken takes what the tokenizer refuses with any other kind of error.
        except Exception as error:
            raise TokenMismatch(
                f"the tokenizer itself refuses the text {text[:60]!r} ({error})"
            ) from error
        found = self._backend.encode(text).tolist()
        if found != expected:
            raise TokenMismatch(
                f"gigatoken gives {_shown(found, expected)} where the tokenizer itself gives "
                f"{_shown(expected, found)}, for the text {text[:60]!r}"
            )


def _shown(ids: list[int], others: list[int]) -> str:
    """A few ids around the first that differ."""
    same = 0
    while same < min(len(ids), len(others)) and ids[same] == others[same]:
        same += 1
    first = max(0, same - 2)
    return ("... " if first else "") + str(ids[first : same + 3])


def _groups(texts: list[bytes]) -> Iterator[list[bytes]]:
    """Consecutive texts whose padded matrix does not become too large."""
    lengths = list(map(len, texts))
    padded = max(lengths, default=0) * len(texts)
    if len(texts) < 2 or padded <= max(_PADDED_AT_LEAST, _PADDED_PER_BYTE * sum(lengths)):
        yield texts
        return
    middle = len(texts) // 2
    yield from _groups(texts[:middle])
    yield from _groups(texts[middle:])
