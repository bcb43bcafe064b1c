"""Text to token ids in which a control token that is spelled out in the text stays text.

A row may quote `</s>` or `<|endoftext|>`. Read as the control token, it would end an answer in the middle of a
sentence, and train the student to do so. Only the tokenizer's own additions (a BOS token, say) and the control tokens
that stand in the prompt's template become control tokens; everything from a row or a user is text. Where a text holds
no control token, the ids are exactly those that `tokenizer(text)` gives to any other program.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from pst_dist.errors import DataError


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens of a tokenizer that steer a model instead of standing for text, by id.

    The unknown token is left out, because it stands for text, unless it also is the end of a sequence, its beginning
    or padding.
    """
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {index: tokenizer.convert_ids_to_tokens(index) for index in tokenizer.all_special_ids}
    tokens = added | named
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        tokens.pop(tokenizer.unk_token_id, None)
    return tokens


class TextIds:
    """Encodes texts for one tokenizer, whose tokens must not change any more."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        longest_first = sorted(self.control.values(), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        whole = tokenizer("a")["input_ids"]
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        start = next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)
        self._before, self._after = list(whole[:start]), list(whole[start + len(bare) :])
        self._controls_of_template = functools.lru_cache(maxsize=16)(self._template_controls)

    def text(self, text: str) -> list[int]:
        """Token ids of a text alone, without a control token among them; raises DataError where there is no such way.

        A tokenizer whose ordinary vocabulary holds its control tokens (T5's) is given the text in parts that cut
        through them.
        """
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self.control.keys().isdisjoint(ids):
            return list(ids)
        return self._by_pieces(text, ids)

    def prompt(self, template: str, question: str) -> list[int]:
        """Token ids of `template` with its `{question}` replaced, and what the tokenizer adds around a text.

        Control tokens in the template are control tokens, in the question they are text. Raises DataError as `text`.
        """
        before, _, after = template.partition("{question}")
        ids = list(self.tokenizer(before + question + after)["input_ids"])
        if [token for token in ids if token in self.control] == self._controls_of_template(before, after):
            return ids
        # The template's text around the question is encoded together with it, up to the nearest control tokens.
        last = [match.end() for match in self._spelled.finditer(before)][-1:] or [0]
        first = self._spelled.search(after)
        end = first.start() if first is not None else len(after)
        return [
            *self._before,
            *self._parsed(before[: last[0]]),
            *self.text(before[last[0] :] + question + after[:end]),
            *self._parsed(after[end:]),
            *self._after,
        ]

    def _template_controls(self, before: str, after: str) -> list[int]:
        ids = self.tokenizer(f"{before}a{after}")["input_ids"]
        return [token for token in ids if token in self.control]

    def _parsed(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _by_pieces(self, text: str, ids: list[int]) -> list[int]:
        """The backend's own steps, with each word cut through the control tokens that its model would find in it."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        if core is not None:
            normal = core.normalizer.normalize_str(text) if core.normalizer is not None else text
            words = [normal]
            if core.pre_tokenizer is not None:
                words = [word for word, _ in core.pre_tokenizer.pre_tokenize_str(normal)]
            ids = [index for word in words for index in self._cut(core.model, word)]
        found = next((self.control[index] for index in ids if index in self.control), None)
        if found is None:
            return ids
        raise DataError(
            f"this tokenizer can read a part of {text[:80]!r} as its control token {found} only",
            "remove it from the text, or use another student",
        )

    def _cut(self, model: Any, word: str) -> list[int]:
        ids = [token.id for token in model.tokenize(word)]
        for index in ids:
            place = word.find(self.control[index]) if index in self.control else -1
            if place >= 0 and len(self.control[index]) > 1:
                return self._cut(model, word[: place + 1]) + self._cut(model, word[place + 1 :])
        return ids
