"""Rows per second of decoding test rows: ours, a plain loop over `generate`, and transformers' continuous batching.

    python benchmarks/evaluate_throughput.py RUN [RUN …] [--rows 200] [--batch-size 64] [--rounds 3] [--threads 1]
                                             [--clock wall] [--single-rows 40] [--continuous] [--output FILE]

Each RUN is a finished run with a causal student. All contenders give the same student the same prompts and stop at the
same tokens. `loop` is what one writes by hand: batches in the order of the rows, padded on the left, each until its
last row has ended. `one by one` decodes single questions. Given are rows per second of wall time (or of CPU time, which
says more on a busy machine), and the median over rounds of the time over ours in the same round; and on how many rows
the generated tokens differ from ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import CLOCKS, compared, machine, paired_rounds

from pst_dist.config.loading import load_config
from pst_dist.data.shards import ShardSet
from pst_dist.evaluation.decoder import Decoder
from pst_dist.evaluation.scores import rows_to_score
from pst_dist.storage.manifest import write_json
from pst_dist.student.batch_generation import evaluation_mode, until_end
from pst_dist.student.contexts import answer_contexts
from pst_dist.student.saved import answer_generation_config, load_student

OURS, LOOP, SINGLE, CONTINUOUS = "pst_dist", "loop", "one by one", "continuous batching"


class Problem:
    """The test rows of a run as prompts, and ways to decode them; each returns the tokens of each row."""

    def __init__(self, run: Path, rows: int, batch_size: int, single_rows: int) -> None:
        config = load_config(str(run))
        changed = {"batch_size": batch_size, "batch_tokens": None}
        self.config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changed)})
        self.student = load_student(run / "best", "cpu")
        if self.student.model.config.is_encoder_decoder:
            raise SystemExit(f"{run}: not a causal student")
        shards = ShardSet.open(Path(config.data_dir or run / "data") / "shards", verify=False)
        self.samples = rows_to_score(shards.split("test"), rows)
        self.size = batch_size
        self.single_rows = min(single_rows, len(self.samples))
        """Rows that `one by one` decodes; its time is scaled to all."""
        questions = [self.student.format.asked(sample) for sample in self.samples]
        parts = (self.student.model, self.student.tokenizer, self.student.format)
        self.prompts = [context.prompt for context in answer_contexts(*parts, questions)]
        self.settings = answer_generation_config(*parts)
        self.settings.max_new_tokens = config.evaluate.max_new_tokens
        ends = self.settings.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]

    def ours(self) -> list[list[int]]:
        """`Decoder`, as `pst evaluate` uses it, without files."""
        return [answer.token_ids for answer in Decoder(self.config, self.student).answers(self.samples)]

    def loop(self) -> list[list[int]]:
        """Batches in the order of the rows."""
        return self._padded(self.prompts, self.size)

    def one_by_one(self) -> list[list[int]]:
        """Some of the rows, each alone."""
        return self._padded(self.prompts[: self.single_rows], 1)

    def continuous(self) -> list[list[int]]:
        """transformers' own scheduler over a paged cache."""
        with evaluation_mode(self.student.model, self.settings):
            found = self.student.model.generate_batch(self.prompts, generation_config=self.settings)
        outputs = [found[name] for name in sorted(found, key=lambda name: int(name.rpartition("_")[2]))]
        return [until_end(list(output.generated_tokens), self.ends) for output in outputs]

    def _padded(self, prompts: list[list[int]], size: int) -> list[list[int]]:
        made: list[list[int]] = []
        with evaluation_mode(self.student.model, self.settings), torch.no_grad():
            for start in range(0, len(prompts), size):
                batch = prompts[start : start + size]
                longest = max(map(len, batch))
                fill = [longest - len(ids) for ids in batch]
                output = self.student.model.generate(
                    input_ids=torch.tensor(
                        [[self.settings.pad_token_id] * k + ids for k, ids in zip(fill, batch, strict=True)]
                    ),
                    attention_mask=torch.tensor([[0] * k + [1] * len(ids) for k, ids in zip(fill, batch, strict=True)]),
                )
                made += [until_end(ids, self.ends) for ids in output[:, longest:].tolist()]
        return made


def measure(problem: Problem, rounds: int, *, clock: str, continuous: bool) -> dict[str, dict[str, Any]]:
    """The table of one run."""
    ways: dict[str, Callable[[], list[list[int]]]] = {
        OURS: problem.ours,
        LOOP: problem.loop,
        SINGLE: problem.one_by_one,
    }
    if continuous:
        ways[CONTINUOUS] = problem.continuous
    ours = problem.ours()
    differ = {}
    for name, way in ways.items():
        found = way()
        differ[name] = sum(a != b for a, b in zip(found, ours, strict=False))
    seconds = paired_rounds(ways, rounds, CLOCKS[clock])
    share = problem.single_rows / len(ours)
    seconds[SINGLE] = [value / share for value in seconds[SINGLE]]
    table = compared(seconds, OURS)
    for name, row in table.items():
        row["rows_per_second"] = round(len(ours) / row["seconds_median"], 2)
        row["rows_that_differ"] = differ[name]
    return table


def main() -> None:
    """Print a table for each run; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run directory")
    parser.add_argument("--rows", type=int, default=200, help="test rows to decode (default 200)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="seconds that passed, or of this process")
    parser.add_argument("--single-rows", type=int, default=40, help="rows to decode one by one (default 40)")
    parser.add_argument("--continuous", action="store_true", help="also measure transformers' generate_batch")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables = {}
    for run in args.runs:
        problem = Problem(run, args.rows, args.batch_size, args.single_rows)
        tables[str(run)] = table = measure(problem, args.rounds, clock=args.clock, continuous=args.continuous)
        print(f"{run}: {problem.config.arm}, {len(problem.samples)} rows, batches of {args.batch_size}")
        print(f"{'':24}  rows/s  time over ours   lowest to highest   rows that differ")
        for name, row in table.items():
            low, high = row["over_ours_min_max"]
            print(
                f"{name:24}  {row['rows_per_second']:6.1f}  {row['over_ours']:14.2f}   {low:6.2f} to {high:6.2f}    "
                f"{row['rows_that_differ']:16}"
            )
    if args.output:
        write_json(
            args.output,
            {"machine": machine(torch.device("cpu")), "threads": args.threads, "clock": args.clock, "runs": tables},
        )


if __name__ == "__main__":
    main()
