"""The thought of a reasoning model in a text: the tags around it, and the text without it.

The opening tag is often missing, because it was part of the prompt. A thought without its closing tag was cut off.
"""

from __future__ import annotations

import re

from pst_dist.data.sources.marks import last_match
from pst_dist.data.sources.rows import RowError

THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<analysis>", "</analysis>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)
"""Opening and closing tags of a thought, in any case. The opening tag is often missing: it was part of the prompt."""
_TAGS = tuple(tuple(re.compile(re.escape(tag), re.IGNORECASE) for tag in pair) for pair in THOUGHT_TAGS)
_STARTS = tuple(sorted({tag[0] for pair in THOUGHT_TAGS for tag in pair}))
_WRAPPERS = (
    *("<|begin_of_solution|>", "<|end_of_solution|>", "<|start|>assistant", "<|start|>"),
    *("<|end|>", "<|return|>"),
)
_ENDS = re.compile(
    r"(?:\s{0,4}(?:<\|(?:im_end|endoftext|end_of_text|eot_id|eom_id|end|return|eos)\|>|</s>|<eos>|<end_of_turn>|"
    r"<\uff5cend\u2581of\u2581sentence\uff5c>)){1,8}$"
)
_CLOSED = re.compile(r"</(output|response|reply|solution|final|result|conclusion)>$", re.IGNORECASE)
"""The end of a tag around what follows the thought. `<answer>` is an answer mark."""


def split_thought(reply: str) -> tuple[str, str]:
    """The thought without its tags, and the text after its last closing tag; raises RowError if it is not closed."""
    thoughts, rest = [], reply
    for opening, closing in _TAGS:
        closed = last_match(closing, rest)
        if closed is None and opening.search(rest) is None:
            continue
        after = rest[closed.end() :] if closed is not None else ""
        if closed is None or opening.search(after) is not None:
            names = THOUGHT_TAGS[_TAGS.index((opening, closing))]
            raise RowError("cut", f"a thought is cut off: {names[0]} without {names[1]}")
        thoughts.append(closing.sub("", opening.sub("", rest[: closed.start()])).strip())
        rest = after
    return "\n\n".join(filter(None, thoughts)), rest.strip()


def rationale_of(text: str) -> str | None:
    """A whole generation as a rationale: its thought and working without tags; None if the thought is cut off."""
    try:
        parts = map(without_wrappers, split_thought(text))
    except RowError:
        return None
    return "\n\n".join(part for part in parts if part) or None


def without_wrappers(text: str) -> str:
    """A text without the tags that some models put around a whole reply, and the control tokens after it."""
    text = _ENDS.sub("", text.strip())
    for tag in _WRAPPERS:
        text = text.replace(tag, "")
    text = text.strip()
    closed = _CLOSED.search(text[-40:])
    if closed is not None:
        end = len(text) - len(closed.group())
        opening = last_match(re.compile(f"<{closed.group(1)}>", re.IGNORECASE), text[:end])
        if opening is not None:
            text = f"{text[: opening.start()]}\n{text[opening.end() : end]}".strip()
    return text


def has_thought_tag(text: str) -> bool:
    """Whether a text contains an opening or closing tag of a thought."""
    # Most texts have none of the characters with which tags begin, which is found out in a tenth of the time.
    return any(start in text for start in _STARTS) and any(tag.search(text) for tags in _TAGS for tag in tags)
