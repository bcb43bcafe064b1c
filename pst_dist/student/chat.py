"""A tokenizer's chat template as fixed texts: around a question, between earlier turns, around a system text.

Fixed texts make training, decoding, the export and the model card render a conversation in one way, on any day and in
any program. They are taken from the template by rendering it, and used only where they give exactly the token ids of
the tokenizer's own `apply_chat_template`. A conversation that they cannot represent is refused.
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pst_dist.data.sample import Turns
from pst_dist.errors import ConfigError, DataError, first_line
from pst_dist.student.text_ids import TextIds

log = logging.getLogger(__name__)
TODAY = datetime.datetime(2024, 7, 26)
"""What a template that writes a date is given (Llama 3's own default): a prompt must not change from day to day."""
SYSTEM, REPLY, NEXT = "system", "reply", "next"
"""Keys of `Prompt.turns`: the text up to the first user turn, with `{system}` in it; the text between a user turn and
the reply to it; the text between that reply and the next user turn. A key is absent where the template has no place."""
TURN_KEYS = (SYSTEM, REPLY, NEXT)
_QUESTIONS = ("How many are 2 and 3?", '"Quoted", {braces} {{ x }}\nand a second line')
_REPLIES = ("They are 5.", 'A {reply} of "two"\nlines')
_SYSTEM_TEXT = "Answer with {{ a }} number."


@dataclass(frozen=True)
class Prompt:
    """How a question is put to a student."""

    template: str
    """Text around `{question}`."""
    separator: str
    """Text between the prompt and what the student writes first."""
    turns: dict[str, str] | None = None
    """Texts by `TURN_KEYS`; None where a conversation is written into the question instead."""


def chat_prompt(tokenizer: Any, system: str | None) -> Prompt | None:
    """The tokenizer's chat template as fixed texts; None, with a warning, where it cannot be reproduced.

    Raises ConfigError when the template does not take `system`, or when that spells out a control token.
    """
    text_ids = TextIds(tokenizer)
    spelled = next((token for token in text_ids.control.values() if system and token in system), None)
    if spelled is not None:
        raise ConfigError(f"layout.system contains the control token {spelled}", "remove it")
    base: Turns = (("system", system),) if system is not None else ()
    try:
        rendered = rendered_chat(tokenizer, (*base, ("user", "{question}")))
    except Exception as error:  # templates raise what they like, for a system role for one
        if system is not None:
            raise ConfigError(
                f"this student's chat template does not accept layout.system: {first_line(error)}",
                "leave layout.system out, or give layout.prompt yourself",
            ) from error
        log.warning("the student's chat template cannot be used (%s): using the plain prompt", first_line(error))
        return None
    if system is not None and system.strip() not in rendered:
        raise ConfigError(
            "this student's chat template ignores layout.system",
            "remove layout.system, or give layout.prompt yourself",
        )
    for added in (("", ""), _added(tokenizer)):
        template = rendered.removeprefix(added[0]).removesuffix(added[1])
        if template.count("{question}") == 1 and _reproduces(text_ids, template, {}, base, [()]):
            gap = _before_reply(tokenizer, base, rendered)
            separator = separator_after(template, tokenizer) if gap is None else gap
            return Prompt(template, separator, _turns(text_ids, template, base, added))
    if system is not None:
        raise ConfigError(
            "this student's chat template cannot be reproduced token by token, so there is no place for layout.system",
            "give layout.prompt yourself",
        )
    log.warning("the student's chat template cannot be reproduced token by token: using the plain prompt")
    return None


def separator_after(template: str, tokenizer: Any | None) -> str:
    """Nothing after a prompt that ends in white space or a control token, else a space."""
    end = template.partition("{question}")[2]
    control = TextIds(tokenizer).control.values() if tokenizer is not None else ()
    return "" if end[-1:].isspace() or any(end.endswith(token) for token in control) else " "


def conversation_problem(turns: Mapping[str, str], conversation: Turns) -> str | None:
    """Why a prompt with these `Prompt.turns` cannot hold a conversation; None where it can."""
    roles = [role for role, _ in conversation]
    if roles[:1] == ["system"]:
        if SYSTEM not in turns:
            return "the row has a system text, and the student's chat template takes none"
        roles = roles[1:]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        return f"the student's chat template needs user and assistant turns in alternation, not {', '.join(roles)}"
    if len(roles) > 1 and NEXT not in turns:
        return "the row has earlier turns, and the student's chat template takes none"
    return None


def conversation_pieces(prompt: str, turns: Mapping[str, str], conversation: Turns, prefix: str = "") -> list[str]:
    """The text of a conversation as pieces, by turns the prompt's own and the row's, the prompt's first and last.

    `prefix` stands before the last question. Raises DataError for a conversation that the prompt cannot hold.
    """
    problem = conversation_problem(turns, conversation)
    if problem is not None:
        raise DataError(problem, "leave the row out, or give layout.prompt yourself: it is then one text")
    head, _, end = prompt.partition("{question}")
    pieces = [head]
    if conversation[0][0] == "system":
        first, _, second = turns[SYSTEM].partition("{system}")
        pieces = [first, conversation[0][1], second]
        conversation = conversation[1:]
    for role, text in conversation[:-1]:
        pieces += [text, turns[REPLY] if role == "user" else turns[NEXT]]
    pieces[-1] += prefix
    return [*pieces, conversation[-1][1], end]


def rendered_chat(tokenizer: Any, conversation: Turns, *, ask: bool = True, tokenize: bool = False) -> Any:
    """The tokenizer's own rendering: text, or token ids. `ask` ends it where the assistant's reply begins."""
    made = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in conversation],
        chat_template=_dated(tokenizer.get_chat_template()),
        tokenize=tokenize,
        add_generation_prompt=ask,
        **({"return_dict": True} if tokenize else {}),
    )
    return list(made["input_ids"]) if tokenize else made


def _dated(template: str) -> str:
    """The template with a fixed date in place of transformers' `strftime_now`."""
    if "strftime_now" not in template:
        return template
    steps = "".join(f" | replace({'%' + letter!r}, {TODAY.strftime('%' + letter)!r})" for letter in "aAbBdmyYHIMSpj")
    return f"{{%- macro strftime_now(pattern) -%}}{{{{ pattern{steps} }}}}{{%- endmacro -%}}{template}"


def _added(tokenizer: Any) -> tuple[str, str]:
    """The special tokens that `tokenizer(text)` adds by itself, before and after the text."""
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    start = next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)
    first, last = whole[:start], whole[start + len(bare) :]
    return "".join(tokenizer.convert_ids_to_tokens(first)), "".join(tokenizer.convert_ids_to_tokens(last))


def _before_reply(tokenizer: Any, base: Turns, rendered: str) -> str | None:
    """The white space that the template writes between the prompt and a reply; None where it writes something else."""
    try:
        whole = rendered_chat(tokenizer, (*base, ("user", "{question}"), ("assistant", "{reply}")), ask=False)
    except Exception:  # the template takes no reply
        return None
    gap, found, _ = whole.removeprefix(rendered).partition("{reply}")
    return gap if whole.startswith(rendered) and found and not gap.strip() else None


def _turns(text_ids: TextIds, template: str, base: Turns, added: tuple[str, str]) -> dict[str, str]:
    """The texts by `TURN_KEYS` that give the template's own ids; `base` is the config's system turn, or nothing."""
    head, _, end = template.partition("{question}")
    exchanges = [
        (("user", question), ("assistant", reply)) for question, reply in zip(_QUESTIONS, _REPLIES, strict=True)
    ]
    starts: list[Turns] = [exchanges[0], (*exchanges[0], *exchanges[1])]
    turns: dict[str, str] = {}
    asked = (("user", "{one}"), ("assistant", "{two}"), ("user", "{question}"))
    found = _between(text_ids.tokenizer, base, asked, added)
    if found is not None and (found[0], found[3]) == (head, end):
        tried = {REPLY: found[1], NEXT: found[2]}
        if _reproduces(text_ids, template, tried, base, starts):
            turns = tried
    found = _between(text_ids.tokenizer, (), (("system", "{system}"), ("user", "{question}")), added)
    if found is not None and found[2] == end:
        tried = {**turns, SYSTEM: f"{found[0]}{{system}}{found[1]}"}
        told: Turns = (("system", _SYSTEM_TEXT),)
        if _reproduces(text_ids, template, tried, (), [told, *((*told, *start) for start in starts if turns)]):
            turns = tried
    return turns


def _between(tokenizer: Any, base: Turns, conversation: Turns, added: tuple[str, str]) -> list[str] | None:
    """The template's own texts around those of a conversation behind `base`; None where it does not give each once."""
    try:
        rest = rendered_chat(tokenizer, (*base, *conversation)).removeprefix(added[0]).removesuffix(added[1])
    except Exception:  # the template takes no such conversation
        return None
    pieces = []
    for _, text in conversation:
        if rest.count(text) != 1:
            return None
        piece, _, rest = rest.partition(text)
        pieces.append(piece)
    return [*pieces, rest]


def _reproduces(
    text_ids: TextIds, template: str, turns: Mapping[str, str], base: Turns, starts: Sequence[Turns]
) -> bool:
    """Whether the texts give the ids of `apply_chat_template` for questions behind each conversation of `starts`.

    `base` is part of `template`, and a turn for the tokenizer. No text has outer white space.
    """
    for start in starts:
        for question in _QUESTIONS:
            conversation: Turns = (*start, ("user", question))
            try:
                ours = text_ids.mixed(conversation_pieces(template, turns, conversation))
                if ours != rendered_chat(text_ids.tokenizer, (*base, *conversation), tokenize=True):
                    return False
            except Exception:  # the template's own, or a text that cannot be encoded
                return False
    return True
