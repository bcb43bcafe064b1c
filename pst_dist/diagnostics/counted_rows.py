"""Counts what a run trains on: rows, the tokens of an epoch, the longest row. Reads the shards, or else the sources.

It needs neither torch nor the student's tokenizer: a byte tokenizer's tokens are counted, others are estimated.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pst_dist.arms import ARMS, Segment
from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.student.prompt import AUTO, FRESH_PROMPT

_CHARACTERS_A_TOKEN = 4.0


@dataclass(frozen=True)
class Rows:
    """Counts of the training rows."""

    rows: int
    texts: int
    """Rationales to embed."""
    tokens: float
    """Tokens of all training sequences of one epoch."""
    shard_bytes: int
    exact: bool
    """Whether tokens are counted; otherwise they are estimated at four characters each."""
    slots: int = 0
    """Samples of one epoch: the rows, in a mixture as often as their weights say."""
    longest: int = 0
    """Tokens of the longest row; 0 when unknown."""
    prompt_share: float = 0.5
    """The share of the tokens that are of prompts, which an encoder reads."""


TrainingRows = tuple[Any, int]
"""The training rows, and the bytes of their shards; 0 if nothing is packed."""


ReadRows = Callable[[], TrainingRows]


def rows_once(config: Config) -> ReadRows:
    """Reads the rows of a config when it is called first, for the plans of its arms."""
    return functools.cache(lambda: read_rows(config))


def read_rows(config: Config) -> TrainingRows:
    """The training rows in the shards, or in the sources if nothing is packed; raises what those raise."""
    run = run_dir(config)
    if (run.shards / "manifest.json").is_file():
        from pst_dist.data.shards import ShardSet

        shards = ShardSet.open(run.shards, verify=False)
        return shards.split("train"), sum(shard.bytes for shard in shards.shards())
    from pst_dist.data.sources import load_data

    return load_data(config).splits.get("train", []), 0


def count_rows(config: Config, read: ReadRows | None = None) -> Rows:
    """Count what the arm of a config makes of its training rows; raises as `read_rows`."""
    from pst_dist.data.sources.mixture import parts_of

    samples, size = read_rows(config) if read is None else read()
    arm = ARMS[config.arm]
    reads = config.loss.rationale_weight > 0 or (config.loss.pooling == "span" and arm.aligned)
    exact = config.student.model_name_or_path is None and config.student.fresh.tokenizer == "byte"
    a_token = 1.0 if exact else _CHARACTERS_A_TOKEN
    template = FRESH_PROMPT if config.layout.prompt == AUTO else config.layout.prompt  # a guess, without the tokenizer
    prompt = len(template) - len("{question}") + 3  # the space before an answer, its stop, the end
    tokens, texts, prompts, longest = 0.0, 0, 0.0, 0.0
    for sample in samples:
        written = len(sample.rationales[0].encode()) if arm.needs_rationale and reads and sample.rationales else 0
        once = len(sample.question.encode()) + prompt + len(sample.answer.encode())
        for asked in arm.asked:
            size_of_one = once + (written if Segment.RATIONALE in asked.order else 0)
            length = min(config.layout.max_length, size_of_one / a_token) + (Segment.SEMANTIC in asked.order)
            tokens, longest = tokens + length, max(longest, length)
            prompts += min(config.layout.max_length, (len(sample.question.encode()) + prompt) / a_token)
        texts += len(sample.rationales)
    counts = Counter(sample.part for sample in samples)
    weights = {name: source.weight for name, source in zip(parts_of(config), config.data.mixture, strict=True)}
    slots = sum(max(1, round(rows * weights.get(name, 1))) for name, rows in counts.items())
    share = prompts / tokens if tokens else 0.5
    return Rows(len(samples), texts, tokens, size or round(tokens * a_token), exact, slots, math.ceil(longest), share)


def longest_row(config: Config, rows: Rows) -> int:
    """Tokens of the longest row of a pass; half as many again as the mean row has, where it was not counted."""
    return max(1, min(config.layout.max_length, rows.longest or math.ceil(1.5 * rows.tokens / max(1, rows.rows))))
