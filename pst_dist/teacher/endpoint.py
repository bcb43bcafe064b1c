"""A teacher behind an OpenAI-compatible endpoint, asked through the official async client, with tenacity's retries.

What may pass is tried again: no connection, a timeout, 408, 409, 429, 5xx, and a reply that is not what the interface
promises. `Retry-After` is obeyed by all requests together. Everything else ends the job with one line. The key comes
from the environment, goes into the client and nowhere else; redirects are not followed, so it reaches one origin only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pst_dist.errors import EnvironmentFault, InputError, PstError, first_line
from pst_dist.teacher.ledger import Ledger
from pst_dist.teacher.limits import Pace
from pst_dist.teacher.messages import Reply, Request, Usage
from pst_dist.teacher.reading import Again, read_answer
from pst_dist.teacher.settings import TeachSettings
from pst_dist.teacher.wire import (
    NOT_ACCEPTED,
    body_of,
    cause_of,
    key_of,
    make_client,
    message_of,
    retry_after,
    shown,
)
from pst_dist.text.redaction import MARK, redact
from pst_dist.text.urls import origin

log = logging.getLogger(__name__)

LONGEST_WAIT_SECONDS = 300.0
"""A server that asks for a longer pause is given up."""
_FIRST_TRIES = 3
"""Attempts while the endpoint has not answered anything yet, so that a wrong address is told soon."""
_MOST_EMPTY = 3
"""So many questions in a row that stay empty after all retries are the server's fault, and end the job."""
_PASSING = (408, 409, 429)


class Endpoint:
    """The teacher at a URL."""

    def __init__(self, settings: TeachSettings, ledger: Ledger) -> None:
        assert settings.endpoint is not None and settings.model is not None
        self.name, self.chat = settings.model, settings.api == "chat"
        self._settings, self._ledger = settings, ledger
        self._key = key_of(settings)
        self._pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)
        self._client = make_client(settings, self._key)
        self._answered = ledger.requests > 0
        self._told = 0.0
        self._empty = 0

    async def ask(self, request: Request) -> Reply:
        """The reply; raises EnvironmentFault or InputError in one line when there is none after all retries.

        A question that gets an empty reply each time, while others are answered, has an empty reply.
        """
        from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, wait_random_exponential

        tries = AsyncRetrying(
            retry=retry_if_exception_type(Again),
            stop=lambda state: state.attempt_number > self._most_retries(state.outcome),
            wait=_Waits(wait_random_exponential(multiplier=1, max=60)),
            before_sleep=lambda state: self._before_sleep(state),
        )
        try:
            async for attempt in tries:
                with attempt:
                    return await self._once(request)
        except RetryError as error:
            last = error.last_attempt.exception()
            assert isinstance(last, Again)
            if last.reason == "empty" and self._answered and self._empty + 1 < _MOST_EMPTY:
                self._empty += 1
                self._ledger.failed(last.reason)
                return Reply(text="", finish="stop", usage=self._ledger.estimated_usage(request, ""))
            raise self._given_up(last, error.last_attempt.attempt_number) from last
        raise AssertionError("unreachable")

    async def close(self) -> None:
        """Close the connections."""
        with contextlib.suppress(Exception):  # a connection that is already gone
            await self._client.close()

    # ---- one attempt

    async def _once(self, request: Request) -> Reply:
        most = self._ledger.most(request)
        await self._pace.ready(most)
        used = most
        try:
            with self._client_errors():
                # The client's own limit is for each read, so a server that sends a byte now and then could hold it.
                answer = await asyncio.wait_for(self._send(request), self._settings.timeout_seconds)
                reply = self._read(request, answer)
            used = reply.usage.prompt + reply.usage.completion
            self._answered, self._empty = True, 0
            return reply
        except _Refused as refused:
            return Reply(text=refused.what, finish="refused", usage=Usage(prompt=0, completion=0))
        finally:
            self._pace.correct(most, used)

    async def _send(self, request: Request) -> Any:
        body, extra = body_of(self._settings, request), self._settings.extra
        if self.chat:
            return await self._client.chat.completions.create(**body, extra_body=extra)
        return await self._client.completions.create(**body, extra_body=extra)

    def _read(self, request: Request, answer: Any) -> Reply:
        """The reply in an answer of the server; raises Again for one that does not have the promised form."""
        reply = read_answer(request, answer, chat=self.chat, estimated=self._ledger.estimated_usage, shown=self._shown)
        return self._scrubbed(reply)

    # ---- what can go wrong

    @contextlib.contextmanager
    def _client_errors(self) -> Iterator[None]:
        """The client's exceptions as `Again`, `_Refused` or an error of ours."""
        import openai

        try:
            yield
        except (openai.APITimeoutError, asyncio.TimeoutError) as error:
            what = f"no reply within {self._settings.timeout_seconds:g} s"
            raise Again("timeout", what, reached=self._answered) from error
        except openai.APIConnectionError as error:
            raise Again("connection", f"no connection: {cause_of(error)}", reached=False) from error
        except openai.APIStatusError as error:
            raise self._of_status(error) from error
        except (openai.APIError, ValueError, TypeError, AttributeError) as error:
            raise Again("malformed", f"the reply cannot be read: {self._shown(first_line(error))}") from error

    def _of_status(self, error: Any) -> Exception:
        status = error.status_code
        said = self._shown(message_of(error))
        where = self._settings.endpoint
        if status in _PASSING or status >= 500:
            return Again(str(status), f"the server answers {status}: {said}", retry_after(error.response.headers))
        if status in (401, 403):
            how = (
                f"does not accept the key in ${self._settings.key_env}"
                if self._key
                else f"wants a key, and ${self._settings.key_env} is unset"
            )
            return EnvironmentFault(
                f"the server {how} ({status}: {said})",
                "set the right key in the environment; --key-env NAME takes it from another variable",
                path=where,
            )
        if status == 404:
            return InputError(
                f"the server knows no model {self.name!r} at this address (404: {said})",
                "check --model and --endpoint; most endpoints end in /v1",
                path=where,
            )
        if 300 <= status < 400:
            there = self._shown(error.response.headers.get("location", "another address"))
            same = origin(there) == origin(str(where))
            return InputError(
                f"the endpoint redirects to {there}, which is not followed",
                "name that address" + ("" if same else ", if the key may be sent there"),
                path=where,
            )
        if self._answered and status in NOT_ACCEPTED:
            return _Refused(f"{status}: {said}")
        return InputError(
            f"the server does not accept the request ({status}: {said})",
            "see --omit and --extra for fields that it does not know or needs",
            path=where,
        )

    def _most_retries(self, outcome: Any) -> int:
        failure = outcome.exception()
        seconds = failure.seconds if isinstance(failure, Again) else None
        if seconds is not None and seconds > LONGEST_WAIT_SECONDS:
            return 0
        if not self._answered and isinstance(failure, Again) and not failure.reached:
            return min(self._settings.retries, _FIRST_TRIES - 1)
        return self._settings.retries

    def _before_sleep(self, state: Any) -> None:
        failure = state.outcome.exception()
        self._ledger.failed(failure.reason)
        if failure.seconds is not None:
            self._pace.pause(failure.seconds)
        if time.monotonic() - self._told > 5:  # one line for a storm, not one a request
            self._told = time.monotonic()
            log.warning("%s; trying again in %.0f s", redact(failure.what), state.next_action.sleep)

    def _given_up(self, last: Again, tries: int) -> PstError:
        self._ledger.failed(last.reason)
        wait = f" and asks to wait {last.seconds:.0f} s" if last.seconds is not None else ""
        remedy = "what is answered is kept: run the same command again to continue"
        if not self._answered and not last.reached:
            remedy = "check --endpoint, and that the server runs"
        elif last.reason == "429":
            remedy += "; --requests-per-minute and --tokens-per-minute keep below a limit"
        elif last.reason == "timeout":
            remedy += "; --timeout gives each request more time, --concurrency N asks less at once"
        elif last.reason in ("malformed", "empty"):
            remedy += "; see whether the model needs --api completions or more --reply-tokens"
        times = f"{tries} times" if tries > 1 else "once"
        return EnvironmentFault(f"{last.what}{wait} (tried {times})", remedy, path=self._settings.endpoint)

    # ---- no secret may leave

    def _shown(self, value: object) -> str:
        """The start of a text of the server, on one line and without the key."""
        return shown(self._without_key(str(value)))

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, MARK) if self._key else text

    def _scrubbed(self, reply: Reply) -> Reply:
        thought = None if reply.thought is None else self._without_key(reply.thought)
        return replace(reply, text=self._without_key(reply.text), finish=reply.finish[:40], thought=thought)


class _Refused(Exception):
    """A request that the server does not accept although it accepted others: too long, or filtered."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class _Waits:
    """tenacity's wait: what the server asked for, or else the usual one."""

    def __init__(self, usual: Any) -> None:
        self._usual = usual

    def __call__(self, state: Any) -> float:
        failure = state.outcome.exception()
        asked = failure.seconds if isinstance(failure, Again) else None
        if asked is None:
            return float(self._usual(state))
        return asked + random.uniform(0.1, 1 + asked / 10)  # so that they do not all come back at once
