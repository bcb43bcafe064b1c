"""Generate rows for four small tasks, with rationales like a teacher's in up to four wordings.

Each generator is a pure function of its arguments. Questions are unique. The hash of a question assigns it to one of
three parts (train, validation, test), so different parts never share a question, whatever their seeds. The sizes are
chosen so that a student with a few layers and random weights learns the task in minutes, and faster with the rationale
than without.
"""

from __future__ import annotations

import hashlib
import inspect
import random
import string
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qsl

from pst_dist.data.sample import SPLITS, ReasoningSample, sample_id
from pst_dist.data.tasks.registry import TASKS
from pst_dist.errors import ConfigError

Row = tuple[str, str, tuple[str, ...]]
"""Question, answer, and the rationale in one or more wordings."""
Generator = Callable[..., list[ReasoningSample]]

COIN_WORDINGS = (
    ("{name}: {side}.", "So it is heads up.", "So it is not heads up."),
    ("After {name} it shows {side}.", "In the end heads is up.", "In the end tails is up."),
    ("{side} is up once {name} has had it.", "Heads, as before.", "Tails, other than before."),
    ("With {name} it comes to {side}.", "It still is.", "It no longer is."),
)
"""(a step, the ending for yes, the ending for no). The first wording of each generator is the default."""
LETTER_WORDINGS = (
    ("{word} ends in {letter}", ", ", ". Together: {answer}."),
    ("the last letter of {word} is {letter}", "; ", ", which gives {answer}."),
    ("{letter} closes {word}", ", then ", ". As one word {answer}."),
    ("take {letter} from {word}", " and ", ", so the answer is {answer}."),
)
"""(a step, the separator between steps, the ending)."""
SWAP_WORDINGS = (
    ("{first} gets {one}, {second} gets {other}.", "{asked} has {thing}"),
    ("Now {second} holds {other} and {first} holds {one}.", "So {thing} is with {asked}"),
    ("{one} goes to {first}, {other} to {second}.", "At the end {asked} keeps {thing}"),
    ("After this swap {first} owns {one} while {second} owns {other}.", "{thing} is what {asked} is left with"),
)
"""(a step, the ending)."""
SUM_WORDINGS = (
    ("{left} {sign} {right} = {result}.", "So {value} {thing}."),
    ("{left} {word} {right} is {result}.", "That leaves {value} {thing}."),
    ("{result} is what {left} {word} {right} makes.", "The answer is {value}."),
    ("From {left}, {word} {right}, we come to {result}.", "In the end there are {value}."),
)
"""(a step, the ending)."""

# Of every ten questions seven are for training, one for validation and two for testing.
_PARTS = ("train",) * 7 + ("validation",) + ("test",) * 2
_PATIENCE = 200

_NAMES = (
    "Ada Ben Cara Dan Eva Finn Gina Hugo Ida Jack Kim Leo Mia Ned Olga Paul Rosa Sam Tina Uma Vera Will Xena Yara Zoe "
    "Amir Bela Chen Dora Emil Fay Glen Hana Igor June Kofi Lena Milo Nora Otto"
).split()


def coin_flip(
    rows: int, seed: int, *, part: str | None = None, flips: int = 6, wordings: int = 1
) -> list[ReasoningSample]:
    """Is a coin still heads up after each of `flips` people flipped it or not? Half of the answers are yes."""
    _within("flips", flips, 1, 20)
    _within("wordings", wordings, 1, len(COIN_WORDINGS))

    def make(rng: random.Random) -> Row:
        heads, deeds, steps = True, [], []
        for name in rng.sample(_NAMES, flips):
            if rng.random() < 0.5:
                heads = not heads
                deeds.append(f"{name} flips it.")
            else:
                deeds.append(f"{name} does not flip it.")
            steps.append((name, "heads" if heads else "tails"))
        question = f"A coin is heads up. {' '.join(deeds)} Is it still heads up?"
        said = tuple(
            " ".join([*(step.format(name=name, side=side) for name, side in steps), yes if heads else no])
            for step, yes, no in COIN_WORDINGS[:wordings]
        )
        return question, "yes" if heads else "no", said

    return _unique("coin_flip", make, rows, seed, part)


def last_letters(
    rows: int,
    seed: int,
    *,
    part: str | None = None,
    words: int = 4,
    shortest: int = 3,
    longest: int = 6,
    wordings: int = 1,
) -> list[ReasoningSample]:
    """Join the last letters of `words` random words with `shortest` to `longest` letters each."""
    _within("words", words, 1, 12)
    _within("shortest", shortest, 1, 20)
    _within("longest", longest, shortest, 20)
    _within("wordings", wordings, 1, len(LETTER_WORDINGS))

    def make(rng: random.Random) -> Row:
        chosen = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(shortest, longest))) for _ in range(words)]
        answer = "".join(word[-1] for word in chosen)
        said = tuple(
            between.join(step.format(word=word, letter=word[-1]) for word in chosen) + ending.format(answer=answer)
            for step, between, ending in LETTER_WORDINGS[:wordings]
        )
        return f"Join the last letters of: {' '.join(chosen)}", answer, said

    return _unique("last_letters", make, rows, seed, part)


def shuffled_objects(
    rows: int, seed: int, *, part: str | None = None, people: int = 3, swaps: int = 2, wordings: int = 1
) -> list[ReasoningSample]:
    """What does one of `people` have after `swaps` swaps? The answer is one of the letters A, B, C."""
    _within("people", people, 2, 3)
    _within("swaps", swaps, 1, 12)
    _within("wordings", wordings, 1, len(SWAP_WORDINGS))
    things = "red blue green white black pink".split()

    def make(rng: random.Random) -> Row:
        names, options = rng.sample(_NAMES, people), rng.sample(things, people)
        holds = dict(zip(names, rng.sample(options, people), strict=True))
        start = ", ".join(f"{name} has {thing}" for name, thing in holds.items())
        moves, steps = [], []
        for _ in range(swaps):
            first, second = rng.sample(names, 2)
            holds[first], holds[second] = holds[second], holds[first]
            moves.append(f"{first} and {second} swap.")
            steps.append({"first": first, "one": holds[first], "second": second, "other": holds[second]})
        asked = rng.choice(names)
        letters = TASKS["tracking_shuffled_objects"].choice_letters
        listed = ", ".join(f"({letter}) {option}" for letter, option in zip(letters, options, strict=False))
        answer = letters[options.index(holds[asked])]
        question = f"{start}. {' '.join(moves)} What does {asked} have? Answer choices: {listed}."
        said = tuple(
            " ".join([*(step.format(**made) for made in steps), ending.format(asked=asked, thing=holds[asked])])
            + f": {answer}."
            for step, ending in SWAP_WORDINGS[:wordings]
        )
        return question, answer, said

    return _unique("shuffled_objects", make, rows, seed, part)


def arithmetic(
    rows: int, seed: int, *, part: str | None = None, steps: int = 3, largest: int = 50, wordings: int = 1
) -> list[ReasoningSample]:
    """A word problem of `steps` operations in which no number exceeds `largest`."""
    _within("steps", steps, 1, 8)
    _within("largest", largest, 10, 9999)
    _within("wordings", wordings, 1, len(SUM_WORDINGS))

    def make(rng: random.Random) -> Row:
        name, thing = rng.choice(_NAMES), rng.choice("pens nuts eggs cards books coins".split())
        value = rng.randint(1, largest)
        story, worked = [f"{name} has {value} {thing}."], []
        for _ in range(steps):
            sentence, line, value = _operation(rng, value, largest)
            story.append(sentence)
            worked.append(line)
        question = f"{' '.join(story)} How many {thing} now?"
        said = tuple(
            " ".join([*(step.format(**line) for line in worked), ending.format(value=value, thing=thing)])
            for step, ending in SUM_WORDINGS[:wordings]
        )
        return question, str(value), said

    return _unique("arithmetic", make, rows, seed, part)


def _operation(rng: random.Random, value: int, largest: int) -> tuple[str, dict[str, Any], int]:
    """One step that keeps the number within 1..largest: its sentence, the parts of its rationale line, its result."""
    kinds = []
    if value < largest:
        kinds.append("gain")
    if value > 1:
        kinds.append("lose")
    if value * 2 <= largest:
        kinds.append("double")
    kind = rng.choice(kinds)
    if kind == "gain":
        more = rng.randint(1, largest - value)
        return f"{more} come.", _line(value, "+", "plus", more, value + more), value + more
    if kind == "lose":
        less = rng.randint(1, value - 1)
        return f"{less} go.", _line(value, "-", "minus", less, value - less), value - less
    return "They double.", _line(value, "*", "times", 2, value * 2), value * 2


def _line(left: int, sign: str, word: str, right: int, result: int) -> dict[str, Any]:
    return {"left": left, "sign": sign, "word": word, "right": right, "result": result}


GENERATORS: dict[str, Generator] = {
    "coin_flip": coin_flip,
    "last_letters": last_letters,
    "shuffled_objects": shuffled_objects,
    "arithmetic": arithmetic,
}
"""Generators by name. Arguments are rows, seed, and by keyword `part` and the difficulty settings."""

GENERATOR_TASKS = {
    "coin_flip": TASKS["coin_flip"],
    "last_letters": TASKS["last_letter_concatenation"],
    "shuffled_objects": TASKS["tracking_shuffled_objects"],
    "arithmetic": TASKS["arithmetic"],
}
"""The task that scores each generator's rows."""


def generate(spec: str, default_part: str | None = None) -> tuple[str, list[ReasoningSample]]:
    """The generator's name and the rows for a `gen:NAME?rows=N&seed=S&…` spec.

    `default_part` is the split that the spec is used for; `part=` in the spec overrides it. Raises ConfigError for an
    unknown generator or parameter, a value out of range, or more rows than there are different questions.
    """
    name, _, query = spec.removeprefix("gen:").partition("?")
    if name not in GENERATORS:
        raise ConfigError(f"no generator {name!r} in {spec!r}", "available: " + ", ".join(GENERATORS))
    accepted = [word for word in inspect.signature(GENERATORS[name]).parameters]
    values: dict[str, Any] = {"rows": 1000, "seed": 0, "part": default_part}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in accepted:
            raise ConfigError(f"generator {name} has no parameter {key!r}", "its parameters: " + ", ".join(accepted))
        if key == "part":
            values[key] = text
            continue
        try:
            values[key] = int(text)
        except ValueError as error:
            raise ConfigError(f"{key}={text!r} in {spec!r} is not a whole number") from error
    if query and not parse_qsl(query, keep_blank_values=True):
        raise ConfigError(f"{query!r} in {spec!r} is not of the form name=value&name=value")
    return name, GENERATORS[name](**values)


def _within(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(f"generator parameter {name}={value} is not in {least}..{most}")


def _unique(
    name: str, make: Callable[[random.Random], Row], rows: int, seed: int, part: str | None
) -> list[ReasoningSample]:
    """Draw until `rows` different questions of the requested part are found."""
    if part is not None and part not in SPLITS:
        raise ConfigError(f"part={part!r} is not one of {', '.join(SPLITS)}")
    _within("rows", rows, 1, 10_000_000)
    task = GENERATOR_TASKS[name]
    rng = random.Random(f"{name}/{seed}/{part}")
    seen: set[str] = set()
    samples: list[ReasoningSample] = []
    misses = 0
    while len(samples) < rows:
        question, answer, rationales = make(rng)
        if question in seen or (part is not None and _part_of(question) != part):
            misses += 1
            if misses > _PATIENCE * (len(samples) + 10):
                raise ConfigError(
                    f"generator {name} found only {len(samples)} of the {rows} different questions requested",
                    "request fewer rows, or a setting with more possible questions",
                )
            continue
        seen.add(question)
        samples.append(
            ReasoningSample(
                id=sample_id(f"{name}-{part or 'all'}", question, len(samples)),
                question=question,
                answer=answer,
                rationales=rationales,
                answer_type=task.answer_type,
                source=f"gen:{name}#{len(samples)}",
            )
        )
    return samples


def _part_of(question: str) -> str:
    return _PARTS[int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % len(_PARTS)]
