"""Finds rows that a pretrained student cannot be asked, while rows are read and before shards are made.

`text_ids` reads a control token that is spelled out in a row as text. A tokenizer for which that is impossible makes
the row a bad one, like a row without an answer: `pst check` lists it, and `data.max_bad` says how many may be left out.
So does a conversation that the student's chat template cannot hold.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pst_dist.arms import ARMS
from pst_dist.config.schema import Config
from pst_dist.data.sample import ReasoningSample
from pst_dist.errors import DataError
from pst_dist.logs import quiet_libraries
from pst_dist.models.locate import MINILM, PACKAGED
from pst_dist.student.layout import layout_for
from pst_dist.student.text_ids import TextIds
from pst_dist.student.tokenizer import build_tokenizer

_AT_ONCE = 1000


def is_here(config: Config) -> bool:
    """Whether this machine has the libraries and the files to build the student's tokenizer without a network."""
    name = config.student.model_name_or_path
    has_libraries = all(importlib.util.find_spec(module) is not None for module in ("torch", "transformers"))
    known = name is None or name in (*PACKAGED, MINILM) or Path(name).expanduser().exists()
    return has_libraries and known


class UnreadableRows:
    """Calling it with the samples of a split gives the reason for each that cannot be encoded, by position."""

    def __init__(self, config: Config) -> None:
        """Loads the student's tokenizer; raises what loading it raises, and ConfigError for a bad layout."""
        quiet_libraries()
        tokenizer: Any = build_tokenizer(config.student, ())
        arms = config.arms or [config.arm]
        layouts = [
            layout_for(config.model_copy(update={"arm": arm, "arms": []}), tokenizer, is_encoder_decoder=False)
            for arm in arms
        ]
        self._text_ids, self._layouts = TextIds(tokenizer), layouts
        asked = {layout.format.template(other=other): None for layout in layouts for other in (False, True)}
        self._templates = list(asked)
        self._with_rationales = any(ARMS[arm].needs_rationale for arm in arms)

    def __call__(self, samples: Sequence[ReasoningSample]) -> Mapping[int, str]:
        found: dict[int, str] = {}
        for start in range(0, len(samples), _AT_ONCE):
            part = samples[start : start + _AT_ONCE]
            texts = [self._texts(sample) for sample in part]
            # One call for many texts is many times faster; only suspects are encoded singly, as training does it.
            suspect = self._have_control([text for each in texts for text in each])
            place = 0
            for offset, each in enumerate(texts):
                if part[offset].turns or any(suspect[place : place + len(each)]):
                    reason = self._reason(part[offset])
                    if reason is not None:
                        found[start + offset] = reason
                place += len(each)
        return found

    def _texts(self, sample: ReasoningSample) -> list[str]:
        rationales = sample.rationales if self._with_rationales else ()
        asked = [template.replace("{question}", sample.question) for template in self._templates]
        return [*asked, sample.question, " " + sample.answer, *(" " + rationale for rationale in rationales)]

    def _have_control(self, texts: list[str]) -> list[bool]:
        """Whether the ids of each text, split inside control tokens, hold one nevertheless."""
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        made = self._text_ids.tokenizer(texts, **options)["input_ids"]
        return [not self._text_ids.control.keys().isdisjoint(ids) for ids in made]

    def _reason(self, sample: ReasoningSample) -> str | None:
        try:
            for layout in self._layouts:
                for other in (False, True):
                    layout.prompt_ids(layout.format.asked(sample), other=other)
            self._text_ids.text(" " + sample.answer)
            for rationale in sample.rationales if self._with_rationales else ():
                self._text_ids.text(" " + rationale)
        except DataError as error:
            return error.what
        return None


def unreadable_rows(config: Config) -> UnreadableRows | None:
    """The check for a config; None for a fresh student, which can encode every text, or one that is not here."""
    if config.student.model_name_or_path is None or not is_here(config):
        return None
    return UnreadableRows(config)
