"""Hand out an answer's text while it is generated, for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pst_dist.arms import ARMS
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.generate import text_of

_HALF = "\ufffd"
"""What a tokenizer gives for the first bytes of a character whose other bytes are not generated yet."""


class AnswerStreamer:
    """A streamer for transformers' `generate` with one question; the pieces together are `Decoded.answer_text`.

    A student that thinks first is silent until its answer marker.
    """

    def __init__(self, tokenizer: Any, fmt: AnswerFormat, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._marker = fmt.answer_marker.strip() if ARMS[fmt.arm].asked[0].thinks_first else ""
        self._ids: list[int] = []
        self._told, self._has_prompt = 0, False

    def put(self, value: Any) -> None:
        """The prompt first, then each token; tensors of any shape."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        self._ids += value.flatten().tolist()
        if not self._text().endswith(_HALF):
            self._tell()

    def end(self) -> None:
        """The rest, at the end of the generation."""
        self._tell()

    def _text(self) -> str:
        text = text_of(self._tokenizer, self._ids)
        return text.partition(self._marker)[2] if self._marker else text

    def _tell(self) -> None:
        text = self._text()
        if len(text) > self._told:
            self._on_text(text[self._told :])
            self._told = len(text)
