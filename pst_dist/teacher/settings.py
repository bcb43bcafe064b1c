"""The settings of one `pst teach`, checked when they are made, and which of them a journal may not change."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pst_dist.errors import ConfigError
from pst_dist.text.redaction import has_secret, redact

PROMPTS = ("zero_shot", "few_shot", "explain")
"""The prompts of this package; a path is a template of the user's."""
SUFFIX = ".teach"
KEY_ENV = "OPENAI_API_KEY"


@dataclass(frozen=True, kw_only=True)
class TeachSettings:
    """Who is asked, what, how often, and at what price. The command line's options have the same names."""

    output: Path
    """The rows with rationales, JSON Lines."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server, such as http://localhost:8000/v1."""
    model: str | None = None
    """The model's name at the endpoint."""
    teacher_model: str | None = None
    """Instead of an endpoint: a folder, hub id, GGUF file or `smollm2`, run by transformers in this process."""
    batch: Path | None = None
    """Instead of an endpoint: the file of requests to write, in the format of OpenAI's Batch API."""
    replies: tuple[Path, ...] = ()
    """Output files of such a batch."""
    api: Literal["chat", "completions"] = "chat"
    """Which of the endpoint's two interfaces."""
    key_env: str = KEY_ENV
    """The environment variable with the key."""
    prompts: tuple[str, ...] = ("zero_shot",)
    """`zero_shot`, `few_shot`, `explain`, or the path of a template; each question is asked with every one."""
    examples: str | None = None
    """Worked examples for few_shot: a file of rows, or `rows` for the given rows themselves."""
    shots: int = 3
    """Examples in a few-shot prompt."""
    samples: int = 1
    """Replies for each question and prompt."""
    temperature: float | None = None
    """Default: 0 for one sample, 0.7 for several."""
    seed: int = 0
    reply_tokens: int = 512
    """Length limit of a reply."""
    omit: tuple[str, ...] = ()
    """Fields that the endpoint does not accept and that are left out: `seed`, `temperature`, `max_tokens`, `stop`."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request body."""
    limit: int | None = None
    """Ask only this many of the questions, the first ones."""
    thoughts: Literal["drop", "keep"] = "drop"
    """Whether a reasoning model's thought is part of the rationale."""
    agree: float = 0.5
    """Share of the samples that must give the same answer: more than this. For rows without a gold answer and for new
    questions."""
    new_questions: int = 0
    """New questions to ask for in the manner of each given one."""
    avoid: tuple[str, ...] = ()
    """Files with questions that no new question may be close to, such as the test rows."""
    near: float = 0.7
    """Similarity from which two questions count as the same: Jaccard of their sequences of five characters."""
    concurrency: int = 8
    """Requests at the same time; for a model in this process, rows in a batch."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout_seconds: float = 120.0
    """How long one request may take."""
    retries: int = 6
    """How often a request is repeated after a failure that may pass."""
    price_in: float = 0.0
    """Price of a million prompt tokens."""
    price_out: float = 0.0
    """Price of a million generated tokens."""
    max_cost: float | None = None
    """Stop before more than this is spent, over all starts of the same command."""
    max_tokens: int | None = None
    """Stop before more tokens than this are used, prompts and replies, over all starts."""

    def __post_init__(self) -> None:
        _check_teacher(self)
        _check_numbers(self)
        if not self.prompts:
            raise ConfigError("--prompt names no prompt", f"choose from {', '.join(PROMPTS)}, or name a template file")
        if self.max_cost is not None and not (self.price_in or self.price_out):
            raise ConfigError("--max-cost needs prices", "give --price-in and --price-out, per million tokens")
        unknown = [name for name in self.omit if name not in ("seed", "temperature", "max_tokens", "stop")]
        if unknown:
            raise ConfigError(f"--omit {unknown[0]}: not a field", "use seed, temperature, max_tokens or stop")
        for name, value in self.extra.items():
            if has_secret(f"{name}={value}"):
                raise ConfigError(f"--extra has a secret under {name}", "the key comes from the environment: --key-env")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise ConfigError(
                "--key-env is not the name of an environment variable",
                "give the name of the variable, never the key itself",
            )

    @property
    def folder(self) -> Path:
        """Journal, quarantine and report, beside the output."""
        return self.output.with_name(self.output.name.removesuffix(".jsonl") + SUFFIX)

    @property
    def heat(self) -> float:
        """The temperature that is sent."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.samples == 1 else 0.7

    @property
    def is_remote(self) -> bool:
        """Whether the teacher is a server, asked live or by files."""
        return self.endpoint is not None or self.batch is not None

    @property
    def teacher_name(self) -> str:
        """The model as named in rows and reports."""
        return self.model or Path(self.teacher_model or "").name or str(self.teacher_model)

    def identity(self) -> dict[str, Any]:
        """What a journal's replies depend on, by the names of the options. Prompts and rows are added by `teach`."""
        return {
            "--model": self.model or self.teacher_model,
            "--api": self.api if self.is_remote else "in this process",
            "--temperature": self.heat,
            "--seed": self.seed,
            "--reply-tokens": self.reply_tokens,
            "--omit": sorted(self.omit),
            "--extra": self.extra,
        }


def _check_teacher(settings: TeachSettings) -> None:
    endpoint = settings.endpoint
    if sum(one is not None for one in (endpoint, settings.teacher_model, settings.batch)) != 1:
        raise ConfigError(
            "name one teacher",
            "--endpoint URL --model NAME for a server, --teacher-model FOLDER for this process, or --batch FILE.jsonl "
            "--model NAME for a batch API",
        )
    if settings.replies and not settings.is_remote:
        raise ConfigError("--replies are those of a batch, not of --teacher-model", "use it with --batch or --endpoint")
    if settings.is_remote and settings.model is None:
        option = "--endpoint" if endpoint else "--batch"
        raise ConfigError(f"{option} needs --model", "the name under which the server offers the model")
    if endpoint is None:
        return
    # A key in the URL would be in the shell's history, in the process list and in every log of a proxy.
    parts = urllib.parse.urlsplit(endpoint)
    if has_secret(endpoint) or parts.username or parts.password or parts.query or parts.fragment:
        shown = redact(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl())
        raise ConfigError(
            f"--endpoint {shown}: has more than scheme, host and path",
            "give the key in the environment (--key-env NAME), and the URL without it",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--endpoint {endpoint!r} is not a URL", "for example http://localhost:8000/v1")


def _check_numbers(settings: TeachSettings) -> None:
    at_least = {"samples": 1, "shots": 1, "reply_tokens": 1, "concurrency": 1, "retries": 0, "new_questions": 0}
    for name, least in at_least.items():
        value = getattr(settings, name)
        if not isinstance(value, int) or value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be a whole number of at least {least}, got {value!r}")
    above_zero = ("limit", "requests_per_minute", "tokens_per_minute", "timeout_seconds", "max_cost", "max_tokens")
    for name in above_zero:
        value = getattr(settings, name)
        if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise ConfigError(f"--{name.replace('_', '-')} must be a number above 0, got {value!r}")
    for name in ("price_in", "price_out"):
        value = getattr(settings, name)
        if not (isinstance(value, int | float) and 0 <= value < float("inf")):
            raise ConfigError(f"--{name.replace('_', '-')} must be a number of at least 0, got {value!r}")
    if not (isinstance(settings.heat, int | float) and 0 <= settings.heat <= 2):
        raise ConfigError(f"--temperature must be between 0 and 2, got {settings.temperature}")
    if not 0 <= settings.agree < 1:
        raise ConfigError(f"--agree must be at least 0 and below 1, got {settings.agree}")
    if not 0 < settings.near <= 1:
        raise ConfigError(f"--near must be above 0 and at most 1, got {settings.near}")
    if settings.samples > 1 and settings.heat == 0:
        raise ConfigError(
            f"--samples {settings.samples} with --temperature 0 would pay for {settings.samples} equal replies",
            "use a temperature such as 0.7, or one sample",
        )
    if settings.new_questions and settings.samples < 2:
        raise ConfigError("--new-questions needs --samples 2 or more", "a new question is kept if its samples agree")


FIELDS = tuple(one.name for one in fields(TeachSettings))
