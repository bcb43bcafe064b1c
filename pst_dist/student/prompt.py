"""Which prompt a student is asked with: the one that the config gives, or one that its model already knows.

`layout.prompt: auto` becomes fixed text: the student's chat template where there is one (`student.chat`), else a plain
template.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError
from pst_dist.student.chat import Prompt, chat_prompt, separator_after
from pst_dist.student.warm_start import warm_shape

AUTO = "auto"
FRESH_PROMPT = "{question} ###"
"""Fine-tune-CoT's prompt (https://github.com/itsnamgyu/reasoning-teacher)."""
PLAIN_PROMPT = "{question}\nAnswer:"


def is_pretrained(config: Config) -> bool:
    """Whether the student starts from a language model; a fresh one and an encoder's weights know no prompt."""
    return config.student.model_name_or_path is not None and warm_shape(config.student) is None


def prompt_of(config: Config, tokenizer: Any | None) -> Prompt:
    """The prompt of a config, with `auto` replaced.

    `tokenizer` is the student's; a fresh student's is not needed. Raises ConfigError for a template without
    `{question}` and for a `layout.system` that the prompt does not hold.
    """
    layout, system = config.layout, config.layout.system
    if system is not None and not system.strip():
        raise ConfigError("layout.system is blank", "give some text, or leave it out")
    made: Prompt | None = None
    template = layout.prompt
    if template == AUTO:
        template = FRESH_PROMPT
        if is_pretrained(config):
            if tokenizer is None:
                raise ValueError("the prompt of a pretrained student depends on its tokenizer")
            made = chat_prompt(tokenizer, system) if getattr(tokenizer, "chat_template", None) else None
            template = PLAIN_PROMPT
    if made is None:
        if template.count("{question}") != 1:
            raise ConfigError(f"layout.prompt: {template!r} must contain {{question}} exactly once")
        made = Prompt(template, separator_after(template, tokenizer), layout.turns)
    if layout.separator != AUTO:
        made = replace(made, separator=layout.separator)
    if system is not None and system.strip() not in made.template:
        raise ConfigError(
            f"layout.system is not part of the prompt, which is {made.template!r}",
            "leave layout.system out, or write its text into layout.prompt",
        )
    return made


def keeps_turns(config: Config) -> bool:
    """Whether the prompt may hold a row's system text and earlier turns as turns."""
    return is_pretrained(config) and (config.layout.prompt == AUTO or config.layout.turns is not None)
