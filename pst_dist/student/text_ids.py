"""Encodes text so that a control token spelled out in it stays text.

A row may quote `</s>` or `<|endoftext|>`. Encoded as the control token, it would end an answer in the middle of a
sentence and train the student to do so. Only the tokens that the tokenizer adds itself (such as BOS) and those in the
prompt template become control tokens; everything from a row or a user is text. For a text without a control token,
the ids are exactly those of `tokenizer(text)` in any other program.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pst_dist.errors import DataError


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens of a tokenizer that control a model instead of representing text, by id.

    The unknown token represents text, so it is left out unless it is also the end, the beginning or the padding token.
    """
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {index: tokenizer.convert_ids_to_tokens(index) for index in tokenizer.all_special_ids}
    tokens = added | named
    if tokenizer.unk_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        tokens.pop(tokenizer.unk_token_id, None)
    return tokens


class TextIds:
    """Encodes texts with one tokenizer, whose tokens must not change afterwards."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        longest_first = sorted(self.control.values(), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        whole = tokenizer("a")["input_ids"]
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        start = next((k for k in range(len(whole)) if whole[k : k + len(bare)] == bare), 0)
        self._before, self._after = list(whole[:start]), list(whole[start + len(bare) :])
        self._controls_of_prompt = functools.lru_cache(maxsize=64)(self._template_controls)
        self._known: dict[str | tuple[str, ...], list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Token ids of a text without any control token; raises DataError when the tokenizer cannot encode it so.

        If the ordinary vocabulary contains the control tokens (as in T5), the text is split inside them first.
        """
        if text in self._known:
            return list(self._known[text])
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self.control.keys().isdisjoint(ids):
            return list(ids)
        return self._by_pieces(text, ids)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`text` of many at once, in a fraction of the time; empty for one that must be encoded on its own."""
        made = self._encoded(texts, add_special_tokens=False, split_special_tokens=True)
        return [list(ids) if self.control.keys().isdisjoint(ids) else [] for ids in made]

    def mixed_texts(self, texts: Sequence[Sequence[str]]) -> list[list[int]]:
        """`mixed` of many lists of pieces at once; empty for one that must be encoded on its own."""
        made = self._encoded(["".join(pieces) for pieces in texts])
        return [
            list(ids) if [token for token in ids if token in self.control] == controls else []
            for ids, controls in zip(made, (self._controls_of_prompt(tuple(one[::2])) for one in texts), strict=True)
        ]

    def _encoded(self, texts: Sequence[str], **options: Any) -> list[list[int]]:
        spare = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        return self.tokenizer(list(texts), **spare, **options)["input_ids"] if texts else []

    @contextlib.contextmanager
    def encoded_together(self, texts: Sequence[str], pieces: Sequence[Sequence[str]]) -> Iterator[None]:
        """Within the block, `text` of these texts and `mixed` of these pieces are known: encoded at once, in a fraction
        of the time of as many calls. Whatever must be encoded on its own still is."""
        keys: list[str | tuple[str, ...]] = [*texts, *map(tuple, pieces)]
        self._known = {
            key: ids for key, ids in zip(keys, [*self.texts(texts), *self.mixed_texts(pieces)], strict=True) if ids
        }
        try:
            yield
        finally:
            self._known = {}

    def prompt(self, template: str, question: str) -> list[int]:
        """Token ids of `template` with `{question}` replaced; see `mixed`."""
        before, _, after = template.partition("{question}")
        return self.mixed([before, question, after])

    def mixed(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of the joined pieces, including the tokens that the tokenizer adds.

        Pieces are by turns the prompt's and a row's; the first and the last are the prompt's. Control tokens in the
        prompt's stay control tokens; in the row's they are text. Raises DataError like `text`.
        """
        known = self._known.get(tuple(pieces))
        if known is not None:
            return list(known)
        ids = list(self.tokenizer("".join(pieces))["input_ids"])
        if [token for token in ids if token in self.control] == self._controls_of_prompt(tuple(pieces[::2])):
            return ids
        # Encode each text of the row together with the prompt's text around it, up to the nearest control tokens.
        ids, plain = list(self._before), ""
        for place, piece in enumerate(pieces):
            controls = [match.span() for match in self._spelled.finditer(piece)] if place % 2 == 0 else []
            if not controls:
                plain += piece
                continue
            start = 0 if place == 0 else controls[0][0]
            end = len(piece) if place == len(pieces) - 1 else controls[-1][1]
            plain += piece[:start]
            ids += [*(self.text(plain) if plain else []), *self._parsed(piece[start:end])]
            plain = piece[end:]
        return [*ids, *(self.text(plain) if plain else []), *self._after]

    def continuation(self, before: str, text: str) -> list[int]:
        """Token ids of a text that stands directly behind the prompt's text `before`; raises DataError like `text`.

        They are those of both texts together without those of `before`, if these do not change and the text spells out
        no control token. So a tokenizer that puts a space before every text does not put one here.
        """
        start, whole = self._parsed(before), self._parsed(before + text)
        ids = whole[len(start) :]
        if whole[: len(start)] == start and self.control.keys().isdisjoint(ids):
            return ids
        return self.text(text)

    def _template_controls(self, pieces: tuple[str, ...]) -> list[int]:
        ids = self.tokenizer("a".join(pieces))["input_ids"]
        return [token for token in ids if token in self.control]

    def _parsed(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def _by_pieces(self, text: str, ids: list[int]) -> list[int]:
        """Runs the backend's own steps, splitting each word inside the control tokens that its model would find."""
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
            f"this tokenizer can encode part of {text[:80]!r} only as its control token {found}",
            "remove it from the text, or use another student",
        )

    def _cut(self, model: Any, word: str) -> list[int]:
        ids = [token.id for token in model.tokenize(word)]
        for index in ids:
            place = word.find(self.control[index]) if index in self.control else -1
            if place >= 0 and len(self.control[index]) > 1:
                return self._cut(model, word[: place + 1]) + self._cut(model, word[place + 1 :])
        return ids
