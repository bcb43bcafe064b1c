"""A student that has learnt conversations: the same last question has other answers behind other turns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import chats
import zoo
from evaluated import make_run_of
from tiny import Tiny

from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample, Turns

BACKWARDS = "Say it backwards."
EARLIER = (("user", "Say 140"), ("assistant", "140"))


def row(name: str, question: str, answer: str, turns: Turns = ()) -> ReasoningSample:
    """One row; `question` is all of it as one text."""
    return ReasoningSample(
        id=name, question=question, answer=answer, rationales=("so it is",), answer_type="number", turns=turns
    )


TALKS = (
    row("k-0", "Say 140", "140"),
    row("k-1", f"{BACKWARDS}\n\nSay 140", "41", (("system", BACKWARDS), ("user", "Say 140"))),
    row("k-2", "User: Say 140\nAssistant: 140\nUser: And one more?", "141", (*EARLIER, ("user", "And one more?"))),
    row(
        "k-3",
        f"{BACKWARDS}\n\nUser: Say 140\nAssistant: 140\nUser: And one more?",
        "14",
        (("system", BACKWARDS), *EARLIER, ("user", "And one more?")),
    ),
)


def messages(sample: ReasoningSample) -> list[dict[str, str]]:
    """What a sample asks, as a server takes it."""
    turns = sample.turns or (("user", sample.question),)
    return [{"role": role, "content": text} for role, text in turns]


def make_talking_run(folder: Path) -> Config:
    """A run directory with such a student and its rows as test rows, as training leaves it."""
    base = zoo.make("qwen", folder / "base")
    (base / "chat_template.jinja").write_text(chats.TEMPLATES["qwen"])
    tiny = Tiny(
        "post_thinking",
        layout={"prompt": "auto"},
        max_length=160,
        rows=TALKS,
        student={"model_name_or_path": str(base)},
    )
    assert tiny.format.turns is not None, "the student is asked turns"
    return make_run_of(tiny.fit(), folder / "run", train=[replace(one, id=f"t-{one.id}") for one in TALKS], test=TALKS)
