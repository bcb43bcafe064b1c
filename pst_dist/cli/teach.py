"""`pst teach`: asks a teacher for rationales, and for new questions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_dist.cli.verb import OVERRIDES, Option, verb

if TYPE_CHECKING:
    from pst_dist.config.schema import Config
    from pst_dist.teacher.settings import TeachSettings


def _more() -> str:
    return """\
What it does: every question is asked --samples times with every --prompt. A reply is kept if its answer is right by the
task's own scoring. Rows without an answer get the answer on which their samples agree. The output has one row per
question and can be passed directly to `pst check` and `pst run data.train=...`.

prompts:
  zero_shot  "Let's think step by step", then "Therefore, the answer is" (two requests; Fine-tune-CoT's)
  few_shot   worked examples first: built-in ones for the 12 tasks, --examples FILE, or --examples rows
  explain    gives the gold answer and asks why it is right; suits students that answer first
  FILE       your own: a .txt with {question}, or a .yaml with prompt, system, answer_prompt; {answer}: the gold answer

files: OUTPUT.jsonl, and in OUTPUT.teach/ the journal (every reply), report.json, cut.jsonl (replies that the length
limit cut off) and dropped.jsonl (other replies that were not kept).

You can stop it at any time and run the same command again: no reply in the journal is requested twice. After a kill,
requests that were in flight (at most --concurrency) are sent again. Start with --dry-run, then --limit 20, then all.

--batch sends nothing: it writes the requests that are due. Run the file, then give its output to the same command with
--replies. zero_shot takes two rounds. When nothing is left to ask, the file of requests is removed.

on=ray runs replicas of --teacher-model on a Ray cluster, with the settings embed.ray.* (address, num_actors, CPUs and
GPUs of each); --concurrency is the number of rows in flight on all replicas together.

The key is read from the environment variable OPENAI_API_KEY, or the one that --key-env names, and is never written."""


def _pairs(text: str) -> dict[str, Any]:
    """The JSON object of --extra."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


_OPTIONS = (
    Option("config", metavar="ROWS", help="the rows (a file, URL, hf:... or gen:...), a config, or a ready-made name"),
    OVERRIDES,
    Option("-o", "--output", required=True, metavar="FILE.jsonl", help="where to write the rows with rationales"),
    Option("--endpoint", metavar="URL", help="OpenAI-compatible server, such as http://localhost:8000/v1"),
    Option("--model", metavar="NAME", help="name of the model at the endpoint"),
    Option(
        "--teacher-model",
        metavar="MODEL",
        help="instead of an endpoint: a folder, hub id, .gguf file or smollm2, run in this process",
    ),
    Option(
        "--batch",
        type=Path,
        metavar="FILE.jsonl",
        help="instead of an endpoint: write the requests to this file, for OpenAI's Batch API or `vllm run-batch`",
    ),
    Option(
        "--replies",
        action="append",
        type=Path,
        metavar="FILE",
        help="take the replies in this output file of a batch (may be repeated)",
    ),
    Option("--api", choices=("chat", "completions"), help="the endpoint's API (default chat)"),
    Option("--key-env", metavar="NAME", help="environment variable with the API key (default OPENAI_API_KEY)"),
    Option(
        "--prompt",
        metavar="NAMES",
        type=_words,
        dest="prompts",
        help="one or more prompts, separated by commas (default zero_shot)",
    ),
    Option(
        "--examples", metavar="FILE", help="for few_shot: a file of rows with rationales, or `rows` for the given rows"
    ),
    Option("--shots", type=int, metavar="N", help="for few_shot: examples per prompt (default 3)"),
    Option("--samples", type=int, metavar="K", help="replies per question and prompt (default 1)"),
    Option("--temperature", type=float, metavar="T", help="default: 0 for one sample, 0.7 for several"),
    Option("--seed", type=int, metavar="N", help="from which each request derives its own seed (default 0)"),
    Option("--reply-tokens", type=int, metavar="N", help="maximum length of a reply (default 512)"),
    Option(
        "--omit",
        type=_words,
        metavar="FIELDS",
        help="request fields to leave out because the server does not know them: seed, max_tokens, ...",
    ),
    Option("--extra", type=_pairs, metavar="JSON", help="additional fields of the request"),
    Option("--limit", type=int, metavar="N", help="ask only the first N questions"),
    Option(
        "--thoughts",
        choices=("drop", "keep"),
        help="keep a reasoning model's thought in the rationale, or drop it (default)",
    ),
    Option("--agree", type=float, metavar="SHARE", help="more than this share of samples must agree (default 0.5)"),
    Option("--new-questions", type=int, metavar="K", help="also ask for K new questions like each one"),
    Option(
        "--avoid", action="append", metavar="FILE", help="test rows; new questions that are close to one are dropped"
    ),
    Option(
        "--near",
        type=float,
        metavar="SIMILARITY",
        help="similarity from which two questions count as close (default 0.7)",
    ),
    Option("--concurrency", type=int, metavar="N", help="requests at the same time, or rows per batch (default 8)"),
    Option("--requests-per-minute", type=float, metavar="N", help="rate limit"),
    Option("--tokens-per-minute", type=float, metavar="N", help="rate limit for prompts and replies together"),
    Option(
        "--timeout",
        type=float,
        metavar="S",
        dest="timeout_seconds",
        help="time limit of a request in seconds (default 120)",
    ),
    Option("--retries", type=int, metavar="N", help="retries after a temporary failure (default 6)"),
    Option("--price-in", type=float, metavar="P", help="price per million prompt tokens"),
    Option("--price-out", type=float, metavar="P", help="price per million generated tokens"),
    Option(
        "--max-cost",
        type=float,
        metavar="C",
        help="stop before more than this is spent, over all starts of the command",
    ),
    Option(
        "--max-tokens", type=int, metavar="N", help="stop before more than this many tokens are used, over all starts"
    ),
    Option("--dry-run", action="store_true", help="estimate requests, tokens and cost; send nothing"),
)


@verb(
    "ask a teacher model for rationales, and for new questions",
    "pst teach rows.jsonl -o rationales.jsonl --endpoint http://localhost:8000/v1 --model NAME --prompt few_shot",
    *_OPTIONS,
    more=_more,
)
def teach(arguments: argparse.Namespace) -> int:
    from pst_dist.errors import ConfigError, PreemptedError
    from pst_dist.teacher.estimate import estimate_lines
    from pst_dist.teacher.report import report_lines
    from pst_dist.teacher.teach import plan, teach

    on_ray = _takes_ray(arguments)
    config, settings = _rows_config(arguments), _settings(arguments)
    if on_ray and settings.teacher_model is None:
        raise ConfigError("on=ray runs replicas of --teacher-model", "an endpoint needs no Ray: raise --concurrency")
    if arguments.dry_run:
        print("\n".join(estimate_lines(plan(config, settings), settings)))
        return 0
    if on_ray:
        from pst_dist.clusters.ray.teach import ray_teacher

        with ray_teacher(config.embed.ray) as make_teacher:
            outcome = teach(config, settings, make_teacher)
    else:
        outcome = teach(config, settings)
    if outcome.report["quality"]["samples"] or not outcome.waiting:
        print("\n".join(report_lines(outcome.report)))
        print(f"{settings.output}: {len(outcome.rows):,} rows; report and dropped replies in {settings.folder}")
    if outcome.waiting:
        print(
            f"{settings.batch}: {outcome.waiting:,} requests. Run them, for example with\n"
            f"  vllm run-batch -i {settings.batch} -o replies.jsonl --model {settings.model}\n"
            "then run this command again with --replies replies.jsonl"
        )
    if outcome.cap is not None:
        raise PreemptedError(f"stopped by {outcome.cap}", "raise it and run the same command again to continue")
    return 0


def _takes_ray(arguments: argparse.Namespace) -> bool:
    """Whether `on=ray` was given; removes it from the overrides, since it is no key of a config."""
    from pst_dist.cli.words import spell_on

    words = spell_on(arguments.overrides, ("on",))
    found = "on=ray" in words
    arguments.overrides = [word for word in words if word not in ("on=ray", "on=local")]
    return found


def _rows_config(arguments: argparse.Namespace) -> Config:
    """The config with the rows as data.train; of a config, only its data, task and arm-independent keys matter."""
    from pst_dist.cli.words import config_of_rows, rows_and_words
    from pst_dist.config.loading import load_config
    from pst_dist.config.locate import is_rows

    if is_rows(arguments.config):
        return config_of_rows(*rows_and_words(arguments.config, arguments.overrides))
    return load_config(arguments.config, arguments.overrides)


def _settings(arguments: argparse.Namespace) -> TeachSettings:
    from pst_dist.teacher.settings import FIELDS, TeachSettings

    given = {name: value for name, value in vars(arguments).items() if name in FIELDS and value is not None}
    given["output"] = Path(given["output"])
    given |= {name: tuple(given[name]) for name in ("prompts", "omit", "avoid", "replies") if name in given}
    return TeachSettings(**given)
