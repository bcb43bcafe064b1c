"""A teacher in this process: a transformers model that answers several requests as one batch.

Each row of a batch draws with a generator of its own, seeded by its request, so a sample depends on its seed and not on
which other requests were in the batch (but for the rounding of a larger matrix product).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from pst_dist.distributed.device_memory import in_halves
from pst_dist.errors import EnvironmentFault, InputError
from pst_dist.models.load import load_language_model, load_tokenizer, positions_of
from pst_dist.models.locate import locate_model
from pst_dist.teacher.batches import Batcher
from pst_dist.teacher.messages import Reply, Request, Usage, as_text
from pst_dist.teacher.settings import TeachSettings

log = logging.getLogger(__name__)


def takes_chat(settings: TeachSettings) -> bool:
    """Whether the model's tokenizer has a chat template; raises InputError or EnvironmentFault if it is unreadable."""
    assert settings.teacher_model is not None
    tokenizer = load_tokenizer(locate_model(settings.teacher_model), "the teacher's tokenizer")
    return getattr(tokenizer, "chat_template", None) is not None


class LocalTeacher:
    """A causal or encoder-decoder model on the best device of this machine."""

    def __init__(self, settings: TeachSettings) -> None:
        import torch

        assert settings.teacher_model is not None
        place = locate_model(settings.teacher_model)
        self.name, self._settings = settings.teacher_name, settings
        self._tokenizer = load_tokenizer(place, "the teacher's tokenizer")
        self._model = load_language_model(place, "the teacher").eval()
        self._device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self._model.to(self._device)
        self.chat = getattr(self._tokenizer, "chat_template", None) is not None
        self._seq2seq = bool(self._model.config.is_encoder_decoder)
        self._positions = positions_of(self._model.config)
        self._batcher = Batcher([lambda requests: asyncio.to_thread(self.answer, requests)], settings.concurrency)
        log.info("teacher %s on %s", self.name, self._device)

    async def ask(self, request: Request) -> Reply:
        """The reply; requests that wait at the same time become one batch."""
        return await self._batcher.ask(request)

    async def close(self) -> None:
        """Drop the model."""
        self._model = None

    def answer(self, requests: list[Request]) -> list[Reply]:
        """The replies to some requests, computed as one batch, or in halves where that does not fit in memory.

        A prompt that is too long for the model is refused. Raises EnvironmentFault for one that does not fit by itself.
        """
        prompts = [self._ids(request) for request in requests]
        replies: list[Reply | None] = [None] * len(requests)
        fits = []
        for place, (request, ids) in enumerate(zip(requests, prompts, strict=True)):
            room = self._room(len(ids))
            if room < 1:
                what = f"the prompt has {len(ids)} tokens, the model reads {self._positions}"
                replies[place] = Reply(text=what, finish="refused", usage=Usage(prompt=0, completion=0))
            else:
                fits.append((place, request, ids, min(room, request.most_tokens)))
        if fits:
            parts = in_halves([(request, ids, most) for _, request, ids, most in fits], self._generate, _too_long)
            written = [out for _, part in parts for out in part]
            for (place, _, ids, most), out in zip(fits, written, strict=True):
                replies[place] = self._reply(ids, out, most)
        return [reply for reply in replies if reply is not None]

    def _room(self, prompt: int) -> int:
        """New tokens that the model's positions allow after a prompt."""
        if self._positions is None:
            return 1 << 30
        return self._positions - 1 if self._seq2seq else self._positions - prompt

    def _ids(self, request: Request) -> list[int]:
        if not self.chat:
            return list(self._tokenizer(as_text(request.turns)).input_ids)
        messages = [{"role": role, "content": text} for role, text in request.turns]
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may refuse a system turn, with any exception of its own
            raise InputError(
                f"the teacher's chat template does not accept the prompt: {error}", "use another prompt"
            ) from error
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _generate(self, batch: Sequence[tuple[Request, list[int], int]]) -> list[list[int]]:
        """New token ids of each request, up to and with its end token."""
        import torch
        from transformers import LogitsProcessorList, StoppingCriteriaList

        pad = self._tokenizer.pad_token_id
        pad = pad if pad is not None else (self._tokenizer.eos_token_id or 0)
        width = max(len(ids) for _, ids, _ in batch)
        left = not self._seq2seq
        rows = [[pad] * (width - len(ids)) + ids if left else ids + [pad] * (width - len(ids)) for _, ids, _ in batch]
        marks = [[0] * (width - len(ids)) + [1] * len(ids) for _, ids, _ in batch]
        marks = marks if left else [row[::-1] for row in marks]
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=torch.tensor(rows, device=self._device),
                attention_mask=torch.tensor(marks, device=self._device),
                max_new_tokens=max(most for _, _, most in batch),
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([_Draw([request for request, _, _ in batch])]),
                stopping_criteria=StoppingCriteriaList([]),
            )
        new = out[:, width:] if left else out[:, 1:]
        ends = self._ends()
        return [_until(ids[:most], ends) for ids, (_, _, most) in zip(new.tolist(), batch, strict=True)]

    def _ends(self) -> set[int]:
        found = self._model.generation_config.eos_token_id
        ends = set(found if isinstance(found, list) else [found]) | {self._tokenizer.eos_token_id}
        return {end for end in ends if end is not None}

    def _reply(self, prompt: list[int], ids: list[int], most: int) -> Reply:
        ended = bool(ids) and ids[-1] in self._ends()
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        finish = "stop" if ended else "length"
        if not self.chat and (stop := text.find("\nQ:")) >= 0:  # as the completions of an endpoint stop
            text, finish = text[:stop], "stop"
        return Reply(text=text, finish=finish, usage=Usage(prompt=len(prompt), completion=len(ids)))


def _too_long(one: tuple[Request, list[int], int]) -> EnvironmentFault:
    _, ids, most = one
    return EnvironmentFault(
        f"a prompt of {len(ids)} tokens, and up to {most} generated, does not fit in memory",
        "generate fewer tokens, or use a smaller teacher",
    )


def _until(ids: list[int], ends: set[int]) -> list[int]:
    for place, one in enumerate(ids):
        if one in ends:
            return ids[: place + 1]
    return ids


class _Draw:
    """A logits processor that draws each row's token: with Gumbel noise added, the largest logit is a sample.

    Each row's noise comes from its own generator. At temperature 0 nothing is added.
    """

    def __init__(self, requests: list[Request]) -> None:
        import torch

        self._heat = [request.temperature for request in requests]
        self._draws = [torch.Generator().manual_seed(request.seed or 0) for request in requests]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        drawn = scores.float().clone()
        for row, (heat, generator) in enumerate(zip(self._heat, self._draws, strict=True)):
            if heat > 0:
                noise = torch.empty(drawn.shape[1], dtype=torch.float64).exponential_(generator=generator)
                drawn[row] = drawn[row] / heat - noise.log().to(drawn)
        return drawn
