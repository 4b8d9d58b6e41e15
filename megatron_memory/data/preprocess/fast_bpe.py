"""gigatoken in place of the Hugging Face tokenizer, held to give the same ids."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from megatron_memory.data.preprocess.tokenizer import TextTokenizer
from megatron_memory.data.tokenizer_hash import PROBE_TEXTS
from megatron_memory.exceptions import DataError

# A document's ids come as a row of a matrix that is as wide as the longest document. Documents are
# encoded together while their bytes, padded, are at most so many times the bytes.
_PADDED_PER_BYTE = 16
_PADDED_AT_LEAST = 1 << 16

_PIECE_CHARACTERS = 2000
_SAMPLED_SHARE = 1 / 1000


class TokenMismatch(DataError):
    """gigatoken and the tokenizer differ on a text."""


class FastEncoder:
    """Texts to ids by gigatoken.

    One byte in a thousand is encoded by the tokenizer itself too, for comparison. That takes a few
    hundredths of the time.
    """

    def __init__(self, tokenizer: TextTokenizer, texts: Iterable[str]) -> None:
        """
        Args:
            tokenizer: with a definition.
            texts: of the input, to compare both on, besides the probes that are always made.

        Raises:
            TokenMismatch: gigatoken does not know this kind of tokenizer, or gives other ids.
        """
        # The package's own Tokenizer loads all that its other ways of use need.
        from gigatoken.gigatoken_rs import BytesSource, PadTruncate, load_hf_json

        assert tokenizer.definition is not None
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
        try:
            expected = self._reference([text])[0]
        except TypeError:
            return  # The text is refused, which is for the document's turn to say.
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
