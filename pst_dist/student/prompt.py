"""Which prompt a student is asked with: the one that the config gives, or one that its model already knows.

`layout.prompt: auto` becomes a plain template with `{question}` in it, so that training, decoding, the export and the
model card render a question in one way. A chat template is taken only where the result has exactly the token ids that
the tokenizer's own `apply_chat_template` gives.
"""

from __future__ import annotations

import logging
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, DataError, first_line
from pst_dist.student.text_ids import TextIds
from pst_dist.student.warm_start import warm_shape

log = logging.getLogger(__name__)
AUTO = "auto"
FRESH_PROMPT = "{question} ###"
"""Fine-tune-CoT's prompt (https://github.com/itsnamgyu/reasoning-teacher)."""
PLAIN_PROMPT = "{question}\nAnswer:"
_PROBES = ("How many are 2 and 3?", '"Quoted", {braces} {{ x }}\nand a second line')


def is_pretrained(config: Config) -> bool:
    """Whether the student starts from a language model; a fresh one and an encoder's weights know no prompt."""
    return config.student.model_name_or_path is not None and warm_shape(config.student) is None


def prompt_of(config: Config, tokenizer: Any | None) -> str:
    """The template around `{question}` for a config, with `auto` replaced.

    `tokenizer` is the student's; a fresh student's is not needed. Raises ConfigError for a template without
    `{question}` and for a `layout.system` that the prompt does not hold.
    """
    layout, system = config.layout, config.layout.system
    if system is not None and not system.strip():
        raise ConfigError("layout.system is blank", "give some text, or leave it out")
    if layout.prompt != AUTO:
        prompt = layout.prompt
    elif not is_pretrained(config):
        prompt = FRESH_PROMPT
    elif tokenizer is None:
        raise ValueError("the prompt of a pretrained student depends on its tokenizer")
    else:
        prompt = _chat_prompt(tokenizer, system) if getattr(tokenizer, "chat_template", None) else PLAIN_PROMPT
    if prompt.count("{question}") != 1:
        raise ConfigError(f"layout.prompt: {prompt!r} must hold {{question}} exactly once")
    if system is not None and system.strip() not in prompt:
        raise ConfigError(
            f"layout.system is not part of the prompt, which is {prompt!r}",
            "leave layout.system out, or write its text into layout.prompt",
        )
    return prompt


def _chat_prompt(tokenizer: Any, system: str | None) -> str:
    """The tokenizer's chat template around `{question}`; PLAIN_PROMPT, with a warning, where it cannot be reproduced.

    Raises ConfigError when the template does not take `system`, or when that spells out a control token.
    """
    text_ids = TextIds(tokenizer)
    spelled = next((token for token in text_ids.control.values() if system and token in system), None)
    if spelled is not None:
        raise ConfigError(f"layout.system contains the control token {spelled}", "remove it")
    try:
        rendered = _rendered(tokenizer, system, "{question}", tokenize=False)
    except Exception as error:  # templates raise what they like, for a system role for one
        if system is not None:
            raise ConfigError(
                f"this student's chat template takes no layout.system: {first_line(error)}",
                "leave layout.system out, or give layout.prompt yourself",
            ) from error
        log.warning("the student's chat template cannot be used (%s): using %r", first_line(error), PLAIN_PROMPT)
        return PLAIN_PROMPT
    if system is not None and system.strip() not in rendered:
        raise ConfigError(
            "this student's chat template leaves layout.system out",
            "remove layout.system, or give layout.prompt yourself",
        )
    for candidate in _without_added(tokenizer, rendered):
        if candidate.count("{question}") == 1 and _reproduces(text_ids, candidate, system):
            return candidate
    log.warning("the student's chat template cannot be reproduced token by token: using %r", PLAIN_PROMPT)
    if system is not None:
        raise ConfigError(
            "this student's chat template cannot be reproduced token by token, so there is no place for layout.system",
            "give layout.prompt yourself",
        )
    return PLAIN_PROMPT


def _rendered(tokenizer: Any, system: str | None, question: str, *, tokenize: bool) -> Any:
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": question})
    made = tokenizer.apply_chat_template(
        messages, tokenize=tokenize, add_generation_prompt=True, **({"return_dict": True} if tokenize else {})
    )
    return list(made["input_ids"]) if tokenize else made


def _without_added(tokenizer: Any, rendered: str) -> list[str]:
    """The rendered text, and the same without the special tokens that `tokenizer(text)` adds by itself."""
    whole, bare = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    start = next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)
    first = "".join(tokenizer.convert_ids_to_tokens(whole[:start]))
    last = "".join(tokenizer.convert_ids_to_tokens(whole[start + len(bare) :]))
    return [rendered, rendered.removeprefix(first).removesuffix(last)]


def _reproduces(text_ids: TextIds, template: str, system: str | None) -> bool:
    """Whether the template gives the ids of `apply_chat_template`; questions have no outer white space."""
    try:
        return all(
            text_ids.prompt(template, probe) == _rendered(text_ids.tokenizer, system, probe, tokenize=True)
            for probe in _PROBES
        )
    except DataError:
        return False
