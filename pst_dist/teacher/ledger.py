"""Tokens and money: what was used, what a request may use at most, and the caps.

Tokens come from the server's `usage`. Before a request its prompt is estimated from its bytes, with the largest ratio
of tokens to bytes seen so far; its reply counts with its length limit. A request is sent only if the caps allow that
for it and for all requests in flight. So a cap can be exceeded only by what a prompt has more than its estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pst_dist.teacher.messages import Reply, Request, Usage
from pst_dist.teacher.settings import TeachSettings

TYPICAL_RATIO = 0.3
"""Tokens per byte of a prompt, of English and a little more."""
_FIRST_RATIO = 1.0
"""The same before any reply has told: no usual tokenizer makes more than one token of a byte."""
_TURN_TOKENS = 8
"""A chat template's own tokens for each turn."""
_MILLION = 1e6


@dataclass
class Ledger:
    """The account of one journal, over all starts."""

    settings: TeachSettings
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: int = 0
    """Requests whose tokens the server did not report."""
    earlier: int = 0
    """Requests of earlier starts; they cost nothing now."""
    failures: dict[str, int] = field(default_factory=dict)
    """This start's attempts without a reply, by reason. A server may have charged for those that ran out of time."""
    ratio: float = 0.0
    """The most tokens per byte of any prompt so far; 0 before the first."""
    _open: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """All tokens used."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def cost(self) -> float:
        """What was spent, in the currency of the prices."""
        return self._price(self.prompt_tokens, self.completion_tokens)

    @property
    def in_flight(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._open)

    def _price(self, prompt: float, completion: float) -> float:
        return (prompt * self.settings.price_in + completion * self.settings.price_out) / _MILLION

    def prompt_estimate(self, request: Request) -> int:
        """Prompt tokens of a request, rounded up."""
        ratio = self.ratio or _FIRST_RATIO
        return int(request.prompt_bytes * ratio) + _TURN_TOKENS * len(request.turns) + 1

    def most(self, request: Request) -> int:
        """Tokens that a request can use: its estimated prompt and its length limit."""
        return self.prompt_estimate(request) + request.most_tokens

    def estimated_usage(self, request: Request, text: str) -> Usage:
        """The tokens of a request whose server reports none: the prompt's estimate, and four characters a token."""
        completion = min(request.most_tokens, len(text) // 4 + 1)
        return Usage(prompt=self.prompt_estimate(request), completion=completion, estimated=True)

    def refused_by(self, request: Request) -> str | None:
        """The cap that a further request would exceed; None if it may be sent."""
        settings = self.settings
        prompt = self.prompt_estimate(request)
        cost = self.cost + sum(cost for cost, _ in self._open.values()) + self._price(prompt, request.most_tokens)
        tokens = self.tokens + sum(tokens for _, tokens in self._open.values()) + prompt + request.most_tokens
        if settings.max_cost is not None and cost > settings.max_cost:
            return f"--max-cost {settings.max_cost:g}"
        if settings.max_tokens is not None and tokens > settings.max_tokens:
            return f"--max-tokens {settings.max_tokens}"
        return None

    def begin(self, request: Request) -> None:
        """Count the most that a request can use until it has ended."""
        prompt = self.prompt_estimate(request)
        self._open[request.key] = self._price(prompt, request.most_tokens), prompt + request.most_tokens

    def end(self, request: Request, reply: Reply | None) -> None:
        """Count what it used instead; None if it got no reply."""
        self._open.pop(request.key, None)
        if reply is None:
            return
        self.add(reply)

    def add(self, reply: Reply, *, earlier: bool = False) -> None:
        """Count a reply; `earlier` for one of the journal."""
        self.requests += 1
        self.prompt_tokens += reply.usage.prompt
        self.completion_tokens += reply.usage.completion
        self.estimated += reply.usage.estimated
        self.earlier += earlier
        if reply.usage.prompt_bytes and reply.usage.prompt and not reply.usage.estimated:
            self.ratio = max(self.ratio, reply.usage.prompt / reply.usage.prompt_bytes)

    def failed(self, reason: str) -> None:
        """Count an attempt without a reply."""
        self.failures[reason] = self.failures.get(reason, 0) + 1

    def to_json(self) -> dict[str, Any]:
        """The account, as in the report."""
        return {
            "requests": self.requests,
            "requests_of_earlier_starts": self.earlier,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "requests_with_estimated_tokens": self.estimated,
            "cost": round(self.cost, 6) if self.settings.price_in or self.settings.price_out else None,
            "failed_attempts": dict(sorted(self.failures.items())),
        }

    def line(self) -> str:
        """The account in one line."""
        parts = [
            f"{self.requests:,} requests" + (f" ({self.earlier:,} of earlier starts)" if self.earlier else ""),
            f"{self.prompt_tokens:,} prompt tokens",
            f"{self.completion_tokens:,} generated",
        ]
        if self.settings.price_in or self.settings.price_out:
            parts.append(f"cost {self.cost:.4f}")
        if self.estimated:
            parts.append(f"tokens of {self.estimated:,} requests estimated")
        if self.failures:
            parts.append("failed attempts: " + ", ".join(f"{why} {n}" for why, n in sorted(self.failures.items())))
        return ", ".join(parts)
