"""Characters that the tokenizers library and gigatoken know by different versions of Unicode.

tokenizers 0.23 splits by Unicode 16 and normalises by Unicode 9; gigatoken 0.10 does both by
Unicode 17. A character that one of them does not have yet is a letter, a digit or a mark to the
other alone. The ranges were found by comparing both over all characters
(tests/data/preprocess/test_fast_definitions.py).
"""

import re
import unicodedata

# fmt: off
_SPLIT: tuple[tuple[int, int], ...] = (
    (0x088F, 0x088F), (0x0C5C, 0x0C5C), (0x0CDC, 0x0CDC), (0xA7CE, 0xA7CF), (0xA7D2, 0xA7D2),
    (0xA7D4, 0xA7D4), (0xA7F1, 0xA7F1), (0x10940, 0x10959), (0x10EC5, 0x10EC7),
    (0x11DB0, 0x11DDB), (0x11DE0, 0x11DE9), (0x16EA0, 0x16EB8), (0x16EBB, 0x16ED3),
    (0x16FF2, 0x16FF6), (0x187F8, 0x187FF), (0x18D09, 0x18D1E), (0x18D80, 0x18DF2),
    (0x1E6C0, 0x1E6DE), (0x1E6E0, 0x1E6E2), (0x1E6E4, 0x1E6E5), (0x1E6E7, 0x1E6ED),
    (0x1E6F0, 0x1E6F4), (0x1E6FE, 0x1E6FF), (0x2B73A, 0x2B73F), (0x2CEA2, 0x2CEAD),
    (0x323B0, 0x33479),
)
"""First and last character of each range that is split differently."""
_NORMALIZED: tuple[tuple[int, int], ...] = (
    (0x07FD, 0x07FD), (0x0897, 0x089F), (0x08CA, 0x08D3), (0x09FE, 0x09FE), (0x0C3C, 0x0C3C),
    (0x0D3B, 0x0D3C), (0x0EBA, 0x0EBA), (0x1715, 0x1715), (0x1ABF, 0x1ADD), (0x1AE0, 0x1AEB),
    (0x1DF6, 0x1DFA), (0xA82C, 0xA82C), (0x10D24, 0x10D27), (0x10D69, 0x10D6D),
    (0x10EAB, 0x10EAC), (0x10EFA, 0x10EFB), (0x10EFD, 0x10EFF), (0x10F46, 0x10F50),
    (0x10F82, 0x10F85), (0x11070, 0x11070), (0x1133B, 0x1133B), (0x113C2, 0x113C2),
    (0x113CE, 0x113D0), (0x1145E, 0x1145E), (0x11839, 0x1183A), (0x1193D, 0x1193E),
    (0x11943, 0x11943), (0x119E0, 0x119E0), (0x11A34, 0x11A34), (0x11A47, 0x11A47),
    (0x11A99, 0x11A99), (0x11D42, 0x11D42), (0x11D44, 0x11D45), (0x11D97, 0x11D97),
    (0x11F41, 0x11F42), (0x1611E, 0x1611E), (0x1612F, 0x1612F), (0x16D67, 0x16D67),
    (0x16FF0, 0x16FF1), (0x1E08F, 0x1E08F), (0x1E130, 0x1E136), (0x1E2AE, 0x1E2AE),
    (0x1E2EC, 0x1E2EF), (0x1E4EC, 0x1E4EF), (0x1E5EE, 0x1E5EF), (0x1E6E3, 0x1E6E3),
    (0x1E6E6, 0x1E6E6), (0x1E6EE, 0x1E6EF), (0x1E6F5, 0x1E6F5),
)
# fmt: on
"""The same for NFC."""
_COMPOSED = (
    *((0x11930, 0x11930), (0x11935, 0x11935), (0x11938, 0x11938)),
    *((0x105C0, 0x105FF), (0x11380, 0x113FF), (0x16100, 0x1613F), (0x16D40, 0x16D7F)),
)
"""Characters of Unicode 13 and blocks of 16 with pairs that NFC composes."""

_LAST_OF_FIRST_PLANE = 0xFFFF
_BEYOND_FIRST_PLANE = re.compile("[\U00010000-\U0010ffff]")


class VersionedCharacters:
    """Says whether a text has one of them, or one that this Python's Unicode does not have yet.

    Args:
        categories: whether texts are split by letters, digits and marks.
        normalization: whether they are normalised.
    """

    def __init__(self, *, categories: bool, normalization: bool):
        ranges = (_SPLIT if categories else ()) + (
            (*_NORMALIZED, *_COMPOSED) if normalization else ()
        )
        self._is_needed = categories or normalization
        self._beyond = {c for first, last in ranges for c in range(first, last + 1)}
        near = {c for c in self._beyond if c <= _LAST_OF_FIRST_PLANE}
        near |= {c for c in range(_LAST_OF_FIRST_PLANE + 1) if _is_unknown(c)}
        # Only of the first plane: the expression is then one look into a table a character.
        self._near = re.compile(f"[{''.join(map(_escaped, sorted(near)))}]")

    def __call__(self, text: str) -> bool:
        """Whether the two libraries may give this text other ids."""
        if text.isascii() or not self._is_needed:
            return False
        if self._near.search(text):
            return True
        return any(
            ord(character) in self._beyond or _is_unknown(ord(character))
            for character in set(_BEYOND_FIRST_PLANE.findall(text))
        )


def _is_unknown(character: int) -> bool:
    return unicodedata.category(chr(character)) == "Cn"


def _escaped(character: int) -> str:
    return f"\\u{character:04x}"
