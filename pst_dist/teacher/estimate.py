"""What a job would use at most, before it is started: `pst teach --dry-run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pst_dist.teacher.asking import Sampling
from pst_dist.teacher.ledger import TYPICAL_RATIO, Ledger
from pst_dist.teacher.messages import Reply, Request
from pst_dist.teacher.new_questions import Inventing
from pst_dist.teacher.settings import TeachSettings

_SECONDS_A_TOKEN = 0.02
"""A guess for the time of a job: 50 tokens a second for each request in flight."""


def estimate(
    samplings: Sequence[Sampling],
    inventions: Sequence[Inventing],
    replies: Mapping[str, Reply],
    settings: TeachSettings,
    prompts: int,
) -> dict[str, Any]:
    """Requests, tokens and cost that are still to come, at most, as in the output of `--dry-run`.

    `prompts` is the number of prompts with which a new question is checked.
    """
    ledger = Ledger(settings, ratio=TYPICAL_RATIO)
    requests = prompt_tokens = reply_tokens = 0

    def count(request: Request, times: int = 1, further_prompt: int = 0) -> None:
        nonlocal requests, prompt_tokens, reply_tokens
        requests += times
        prompt_tokens += times * (ledger.prompt_estimate(request) + further_prompt)
        reply_tokens += times * request.most_tokens

    for work in samplings:
        for request, further in _steps(work, replies, settings):
            count(request, further_prompt=further)
    for invention in inventions:
        if (request_of := invention.next_request(replies)) is not None:
            count(request_of)
    if inventions:
        # A new question is as long as the one that it is like; each is asked like a given one.
        for work in samplings:
            for request, further in _steps(work, {}, settings):
                if work.prompt.shows_answer:
                    continue
                count(request, settings.new_questions, further)
    cost = (prompt_tokens * settings.price_in + reply_tokens * settings.price_out) / 1e6
    seconds = reply_tokens * _SECONDS_A_TOKEN / settings.concurrency
    if settings.requests_per_minute:
        seconds = max(seconds, 60 * requests / settings.requests_per_minute)
    if settings.tokens_per_minute:
        seconds = max(seconds, 60 * (prompt_tokens + reply_tokens) / settings.tokens_per_minute)
    return {
        "requests": requests,
        "requests_in_the_journal": len(replies),
        "prompt_tokens": prompt_tokens,
        "reply_tokens_at_most": reply_tokens,
        "cost_at_most": round(cost, 4) if settings.price_in or settings.price_out else None,
        "seconds_guessed": round(seconds),
    }


def _steps(work: Sampling, replies: Mapping[str, Reply], settings: TeachSettings) -> list[tuple[Request, int]]:
    """The requests that are left of a sample, each with the tokens that an earlier reply adds to its prompt."""
    request = work.next_request(replies)
    if request is None:
        return []
    if not request.key.endswith("/1") or work.prompt.second(work.question, "x", work.chat) is None:
        return [(request, 0)]
    return [(request, 0), (request, settings.reply_tokens)]


def estimate_lines(found: Mapping[str, Any], settings: TeachSettings) -> list[str]:
    """The estimate as lines of text."""
    lines = [
        f"requests           {found['requests']:,}"
        + (f" ({found['requests_in_the_journal']:,} are answered)" if found["requests_in_the_journal"] else ""),
        f"prompt tokens      about {found['prompt_tokens']:,}",
        f"generated tokens   at most {found['reply_tokens_at_most']:,} (--reply-tokens {settings.reply_tokens})",
    ]
    if found["cost_at_most"] is not None:
        lines.append(f"cost               at most about {found['cost_at_most']:,.4f}")
    else:
        lines.append("cost               give --price-in and --price-out, per million tokens")
    minutes = found["seconds_guessed"] / 60
    lines.append(f"time               {minutes:,.0f} min at 50 tokens/s for each of {settings.concurrency} requests")
    return lines
