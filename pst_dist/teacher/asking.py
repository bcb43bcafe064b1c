"""Runs the requests: several at a time, each reply into the journal before the next request of its question.

It stops for a cap, a signal, a full disk or a teacher that cannot be reached. The requests in flight are then allowed
to end, because they are paid for, and their replies are kept too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from pst_dist.errors import PreemptedError
from pst_dist.logs import LOG_EVERY_SECONDS, Progress, progress
from pst_dist.teacher.journal import Journal
from pst_dist.teacher.ledger import Ledger
from pst_dist.teacher.messages import Reply, Request, Teacher, Turn
from pst_dist.teacher.prompts import Prompt
from pst_dist.teacher.questions import Question
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.visible import visible

log = logging.getLogger(__name__)


class Work(Protocol):
    """Requests that follow from each other."""

    def next_request(self, replies: Mapping[str, Reply]) -> Request | None:
        """The next request, given the replies so far; None when there is none left."""


@dataclass(frozen=True)
class Sampling:
    """One sample: one question asked once with one prompt, in one or two steps."""

    question: Question
    prompt: Prompt
    number: int
    settings: TeachSettings
    chat: bool

    @property
    def key(self) -> str:
        """The part of its requests' keys that they share."""
        return f"{self.question.id}/{self.prompt.name}/{self.number}"

    def next_request(self, replies: Mapping[str, Reply]) -> Request | None:
        """The question, then, for a prompt of two steps, its answer."""
        first = replies.get(f"{self.key}/1")
        if first is None:
            turns = self.prompt.first(self.question, self.chat)
            return make_request(self.settings, f"{self.key}/1", turns, self.settings.heat)
        if f"{self.key}/2" in replies or first.is_cut or first.finish == "refused":
            return None
        seen = visible(first)
        turns_2 = self.prompt.second(self.question, seen.text, self.chat) if seen is not None and seen.text else None
        if turns_2 is None:
            return None
        return make_request(self.settings, f"{self.key}/2", turns_2, 0.0)


def make_request(
    settings: TeachSettings, key: str, turns: tuple[Turn, ...], temperature: float, most_tokens: int | None = None
) -> Request:
    """A request with a seed of its own, which depends on the job's seed and the key only."""
    digest = hashlib.sha256(f"{settings.seed}/{key}".encode()).digest()
    return Request(
        key=key,
        turns=turns,
        most_tokens=most_tokens or settings.reply_tokens,
        temperature=temperature,
        seed=int.from_bytes(digest[:4], "big") >> 1,
    )


def samplings(
    questions: Sequence[Question], prompts: Sequence[Prompt], settings: TeachSettings, chat: bool
) -> list[Sampling]:
    """Every sample of every question; a prompt that shows the gold answer skips rows without one."""
    return [
        Sampling(question, prompt, number, settings, chat)
        for question in questions
        for prompt in prompts
        if question.gold is not None or not prompt.shows_answer
        for number in range(settings.samples)
    ]


class Asking:
    """The state that all stages of one job share."""

    def __init__(self, teacher: Teacher, journal: Journal, ledger: Ledger, settings: TeachSettings) -> None:
        self.teacher, self.journal, self.ledger, self.settings = teacher, journal, ledger, settings
        self.cap: str | None = None
        """The cap that ended the job early; None if none did."""
        self._stopping = False
        self._signals = 0
        self._ended = asyncio.Event()

    async def run(self, name: str, works: Sequence[Work]) -> None:
        """Ask everything that the journal lacks; does nothing once a cap is reached.

        Raises the teacher's error, EnvironmentFault for a full disk, and PreemptedError after a signal, each after the
        requests in flight have ended.
        """
        left = [work for work in works if work.next_request(self.journal.replies) is not None]
        if not left or self._stopping:
            return
        with progress(name, total=len(works), unit="samples") as bar, self._on_signals():
            bar.skip(len(works) - len(left))
            queue = iter(left)
            workers = [
                asyncio.create_task(self._work(queue, bar)) for _ in range(min(self.settings.concurrency, len(left)))
            ]
            ticker = asyncio.create_task(_tick(bar))
            try:
                await self._finish(workers)
            finally:
                ticker.cancel()

    async def _finish(self, workers: list[asyncio.Task[None]]) -> None:
        """Wait for all workers; after the first error, only for the requests in flight."""
        _, pending = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            self._stopping = True
            self._ended.set()
            _, pending = await asyncio.wait(pending, timeout=self.settings.timeout_seconds)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        failures = [failure for task in workers if not task.cancelled() and (failure := task.exception())]
        if failures:
            raise failures[0]
        if self.journal.full is not None:
            raise self.journal.full
        if self._signals:
            raise PreemptedError(
                "stopped by a signal; every reply so far is kept", "run the same command again to continue"
            )

    async def _work(self, queue: Iterator[Work], bar: Progress) -> None:
        for work in queue:
            while (request := work.next_request(self.journal.replies)) is not None:
                if not await self._may_send(request):
                    return
                reply = None
                try:
                    reply = await self.teacher.ask(request)
                    usage = replace(reply.usage, prompt_bytes=request.prompt_bytes)
                    reply = replace(reply, usage=usage)
                    self.journal.add(request.key, reply)
                finally:
                    self.ledger.end(request, reply)
                    self._ended.set()
                if self.journal.full is not None:
                    self._stopping = True
            bar.advance(note=self._note())

    async def _may_send(self, request: Request) -> bool:
        """Whether caps, disk and signals allow a request; if only those in flight stand in its way, waits for them."""
        while not self._stopping:
            cap = self.ledger.refused_by(request)
            if cap is None:
                self.ledger.begin(request)
                return True
            if not self.ledger.in_flight:
                self.cap, self._stopping = cap, True
                break
            self._ended.clear()
            await self._ended.wait()
        return False

    def _note(self) -> str:
        ledger, settings = self.ledger, self.settings
        cost = f"  cost {ledger.cost:.4f}" if settings.price_in or settings.price_out else ""
        return f"{ledger.tokens:,} tokens{cost}"

    @contextlib.contextmanager
    def _on_signals(self) -> Iterator[None]:
        """The first SIGINT or SIGTERM lets the requests in flight end; the second has its usual effect."""
        loop = asyncio.get_running_loop()

        def stop(number: signal.Signals) -> None:
            self._signals, self._stopping = self._signals + 1, True
            self._ended.set()
            loop.remove_signal_handler(number)
            log.warning("stopping: waiting for the requests in flight, which are charged anyway")

        taken = []
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(RuntimeError, ValueError):  # not the main thread
                loop.add_signal_handler(number, stop, number)
                taken.append(number)
        try:
            yield
        finally:
            for number in taken:
                loop.remove_signal_handler(number)


async def _tick(bar: Progress) -> None:
    """Show the progress line also while no request ends."""
    while True:
        await asyncio.sleep(LOG_EVERY_SECONDS)
        bar.advance(0)


def is_whole(works: Sequence[Work], replies: Mapping[str, Reply]) -> bool:
    """Whether nothing is left to ask."""
    return all(work.next_request(replies) is None for work in works)
