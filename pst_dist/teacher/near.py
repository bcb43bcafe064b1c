"""Which questions are close to each other: exact Jaccard similarity of their sequences of five characters.

Exact, unlike MinHash, which estimates: a test question that an estimate missed would be trained on. The usual prefix
filter keeps it fast: two sets of similarity t or more share an element among the first `n - ceil(t n) + 1` elements of
each, in any fixed order, so only those are indexed.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import defaultdict

from pst_dist.data.sample import normalise_question

_LENGTH = 5
_EPSILON = 1e-9


class NearIndex:
    """Questions that were added, and whether one is close to a further question."""

    def __init__(self, threshold: float, *, ignore_numbers: bool = False) -> None:
        """`ignore_numbers` makes questions equal that differ in their numbers only."""
        self._threshold, self._ignore_numbers = threshold, ignore_numbers
        self._sets: list[frozenset[str]] = []
        self._texts: list[str] = []
        self._places: dict[str, list[int]] = defaultdict(list)

    def add(self, text: str) -> None:
        """Remember a question."""
        pieces = self._pieces(text)
        for piece in self._prefix(pieces):
            self._places[piece].append(len(self._sets))
        self._sets.append(pieces)
        self._texts.append(text)

    def closest(self, text: str) -> tuple[str, float] | None:
        """The most similar question and its similarity; None if none reaches the threshold."""
        pieces = self._pieces(text)
        places = {place for piece in self._prefix(pieces) for place in self._places.get(piece, ())}
        best: tuple[str, float] | None = None
        for place in sorted(places):
            found = jaccard(pieces, self._sets[place])
            if found >= self._threshold - _EPSILON and (best is None or found > best[1]):
                best = self._texts[place], found
        return best

    def _pieces(self, text: str) -> frozenset[str]:
        return pieces_of(text, ignore_numbers=self._ignore_numbers)

    def _prefix(self, pieces: frozenset[str]) -> list[str]:
        needed = len(pieces) - math.ceil(self._threshold * len(pieces) - _EPSILON) + 1
        return sorted(pieces, key=lambda piece: (zlib.crc32(piece.encode()), piece))[:needed]


def pieces_of(text: str, *, ignore_numbers: bool = False) -> frozenset[str]:
    """All sequences of five characters of a question, without case, punctuation and repeated spaces."""
    plain = normalise_question(text)
    if ignore_numbers:
        plain = re.sub(r"\d+(?: \d+)*", "0", plain)
    if len(plain) <= _LENGTH:
        return frozenset([plain])
    return frozenset(plain[start : start + _LENGTH] for start in range(len(plain) - _LENGTH + 1))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Size of the intersection divided by that of the union."""
    common = len(one & other)
    return common / (len(one) + len(other) - common)
