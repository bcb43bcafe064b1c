"""Training examples for an encoder that distinguishes rationales with different conclusions.

A positive is another correct rationale of the same question. A hard negative is a rationale of the same question that
has another conclusion: a wrong sample of the teacher, or a correct rationale with a number, a name or a negation
changed. `embedding.train_encoder` trains on them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pst_dist.data.sample import ReasoningSample, normalise_question

_OPPOSITES = (
    *(("yes", "no"), ("true", "false"), ("heads", "tails"), ("even", "odd"), ("before", "after"), ("left", "right")),
    *(("more", "fewer"), ("greater", "smaller"), ("larger", "smaller"), ("can", "cannot"), ("always", "never")),
    *(("is", "is not"), ("are", "are not"), ("was", "was not"), ("does", "does not"), ("did", "did not")),
    *(("will", "will not"), ("would", "would not"), ("has", "has no"), ("possible", "impossible")),
)
_NUMBER = re.compile(r"(?<![\w.,])\d+(?:\.\d+)?(?![\w]|[.,]\d)")
_QUOTED = re.compile(r"(?<=[\"'\u201c\u2018])[A-Za-z]+(?=[\"'\u201d\u2019])")
_NAME = re.compile(r"(?<=[a-z,;:] )[A-Z][a-z]+\b")
_OPTION = re.compile(r"\(([A-J])\)")
_END = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Triplet:
    """One training example."""

    anchor: str
    positive: str
    """Another correct rationale of the same question; the anchor itself where there is none. The encoder's dropout then
    makes the two views differ (SimCSE, arXiv 2104.08821)."""
    negatives: tuple[str, ...]
    """Rationales with another conclusion, all different and different from anchor and positive."""


@dataclass(frozen=True)
class Triplets:
    """The examples of a set of rows, and what was left out."""

    rows: tuple[Triplet, ...]
    paired: int
    """Examples whose positive is another rationale."""
    from_teacher: int
    """Hard negatives that are wrong samples of the teacher; the others were made by a change."""
    without_negative: int
    """Rationales in which nothing could be changed; they are left out."""


def triplets(
    samples: Sequence[ReasoningSample], wrong: Mapping[str, Sequence[str]], *, negatives: int, seed: int
) -> Triplets:
    """One example per rationale of `samples`, each with `negatives` hard negatives; a function of its arguments alone.

    `wrong` maps `normalise_question(question)` to wrong rationales of that question, which come before changed ones.
    """
    found: list[Triplet] = []
    paired = from_teacher = without = 0
    for sample in samples:
        given = wrong.get(normalise_question(sample.question), ())
        for place, anchor in enumerate(sample.rationales):
            rng = random.Random(f"{seed}/{sample.id}/{place}")
            others = [text for text in sample.rationales if text != anchor]
            positive = rng.choice(others) if others else anchor
            chosen = [text for text in given if text not in sample.rationales][:negatives]
            taught = len(chosen)
            chosen += [text for text in changed_texts(anchor, rng) if text not in (*sample.rationales, *chosen)]
            if not chosen:
                without += 1
                continue
            # Every example needs the same number of columns; a repeated negative only weighs more.
            full = (chosen * negatives)[:negatives]
            found.append(Triplet(anchor, positive, tuple(full)))
            paired += bool(others)
            from_teacher += min(taught, negatives)
    return Triplets(tuple(found), paired, from_teacher, without)


def changed_texts(text: str, rng: random.Random) -> list[str]:
    """Different changes of a rationale, in random order; those of its last sentence, where it concludes, come first.

    Each changes one thing: a number, an option letter, a quoted word, a name, or a word into its opposite.
    """
    edits = [edit for find in (_numbers, _options, _quoted_words, _names, _opposites) for edit in find(text, rng)]
    rng.shuffle(edits)
    last = _last_sentence(text)
    edits.sort(key=lambda edit: edit[0] < last)  # stable
    texts = [text[:start] + new + text[end:] for start, end, new in edits]
    return [new for new in dict.fromkeys(texts) if new != text]


_Edit = tuple[int, int, str]
"""Replace text[start:end] with the string."""


def _last_sentence(text: str) -> int:
    """Where the last sentence begins."""
    ends = [match.end() for match in _END.finditer(text.rstrip())]
    return ends[-1] if ends else 0


def _numbers(text: str, rng: random.Random) -> list[_Edit]:
    edits = []
    for match in _NUMBER.finditer(text):
        whole, _, decimals = match.group().partition(".")
        step = rng.choice((-3, -2, -1, 1, 2, 3, 10))
        number = abs(int(whole) + step)
        if number != int(whole):
            edits.append((match.start(), match.end(), f"{number}.{decimals}" if decimals else str(number)))
    return edits


def _options(text: str, rng: random.Random) -> list[_Edit]:
    letters = sorted({match.group(1) for match in _OPTION.finditer(text)} | set("ABC"))
    return [
        (match.start(1), match.end(1), rng.choice([letter for letter in letters if letter != match.group(1)]))
        for match in _OPTION.finditer(text)
    ]


def _quoted_words(text: str, rng: random.Random) -> list[_Edit]:
    """One letter of a quoted word becomes another: "yajo", "yejo"."""
    edits = []
    for match in _QUOTED.finditer(text):
        place = rng.randrange(len(match.group()))
        letter = match.group()[place].lower()
        new = rng.choice([other for other in "abcdefghijklmnopqrstuvwxyz" if other != letter])
        start = match.start() + place
        edits.append((start, start + 1, new))
    return edits


def _names(text: str, rng: random.Random) -> list[_Edit]:
    """A name becomes another name of the same text."""
    names = sorted({match.group() for match in _NAME.finditer(text)})
    if len(names) < 2:
        return []
    return [
        (match.start(), match.end(), rng.choice([name for name in names if name != match.group()]))
        for match in _NAME.finditer(text)
    ]


def _opposites(text: str, rng: random.Random) -> list[_Edit]:
    edits = []
    for match in _OPPOSITE.finditer(text):
        word = match.group()
        new = rng.choice(_OPPOSITE_OF[word.lower()])
        edits.append((match.start(), match.end(), new.capitalize() if word[0].isupper() else new))
    return edits


def _opposites_of() -> dict[str, list[str]]:
    table: dict[str, list[str]] = {}
    for one, other in _OPPOSITES:
        table.setdefault(one, []).append(other)
        table.setdefault(other, []).append(one)
    return table


_OPPOSITE_OF = _opposites_of()
_OPPOSITE = re.compile(
    # Longer ones first, so that "is not" is not read as "is".
    r"\b(?:" + "|".join(sorted(map(re.escape, _OPPOSITE_OF), key=len, reverse=True)) + r")\b",
    re.IGNORECASE,
)
