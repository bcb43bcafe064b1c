"""Does a vote of sampled answers beat the greedy one? Self-consistency (arXiv 2203.11171) of answer-first students.

    python benchmarks/self_consistency.py RUN [RUN …] [--samples 16] [--temperature 0.5 1.0] [--seed 0] [--output FILE]

A sampled answer of such a student costs as many tokens as the greedy one, a few, so that a vote of 16 is still cheaper
than a rationale. Each RUN is a finished run whose student answers first; its scored test rows are answered anew.
`certain` and `unsure` part the rows by whether more than four in five votes agree: what a vote says of a row even where
it changes no answer.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from measuring import machine

from pst_dist.arms import ARMS
from pst_dist.config.loading import load_config
from pst_dist.data.tasks import Task, get_task
from pst_dist.storage.manifest import read_lines, write_json
from pst_dist.student.generate import text_of
from pst_dist.student.saved import LoadedStudent, answer_generation_config, load_student

_BATCH = 50
_AGREED = 0.8


def votes_of(
    student: LoadedStudent, task: Task, questions: list[str], *, samples: int, temperature: float, most: int
) -> list[Counter[str | None]]:
    """How often each cleansed answer came, a question."""
    settings = answer_generation_config(student.model, student.tokenizer, student.format)
    settings.do_sample, settings.temperature, settings.top_k = True, temperature, 0
    settings.num_return_sequences, settings.max_new_tokens = samples, most
    student.tokenizer.padding_side = "left"
    votes = []
    for start in range(0, len(questions), _BATCH):
        texts = [student.format.render(question) for question in questions[start : start + _BATCH]]
        inputs = student.tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            output = student.model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
            )
        written = output[:, inputs["input_ids"].shape[1] :].tolist()
        answers = [task.cleanse(text_of(student.tokenizer, ids)) for ids in written]
        votes += [Counter(answers[k * samples : (k + 1) * samples]) for k in range(len(texts))]
    return votes


def measure(run: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a temperature for one run."""
    config, student = load_config(str(run)), load_student(run / "best", "cpu")
    if not ARMS[student.format.arm].answers_first or student.model.config.is_encoder_decoder:
        raise SystemExit(f"{run}: not a causal student that answers first")
    task, rows = get_task(config.task, config.data.answer_type), list(read_lines(run / "eval/test/samples.jsonl"))
    found = []
    for temperature in args.temperature:
        torch.manual_seed(args.seed)
        votes = votes_of(
            student,
            task,
            [row["question"] for row in rows],
            samples=args.samples,
            temperature=temperature,
            most=config.evaluate.max_new_tokens,
        )
        right, agreed = [], []
        for row, vote in zip(rows, votes, strict=True):
            answer, count = vote.most_common(1)[0]
            right.append(task.is_correct(answer, row["gold"]))
            agreed.append(count > _AGREED * args.samples)
        certain = [ok for ok, sure in zip(right, agreed, strict=True) if sure]
        unsure = [ok for ok, sure in zip(right, agreed, strict=True) if not sure]
        found.append(
            {
                "run": str(run),
                "arm": student.format.arm,
                "rows": len(rows),
                "temperature": temperature,
                "greedy": sum(row["correct"] for row in rows) / len(rows),
                "majority": sum(right) / len(rows),
                "certain_rows": len(certain),
                "certain": sum(certain) / len(certain) if certain else None,
                "unsure": sum(unsure) / len(unsure) if unsure else None,
            }
        )
        print(_line(found[-1]), flush=True)
    return found


def _line(row: dict[str, Any]) -> str:
    def percent(value: float | None) -> str:
        return "   none" if value is None else f"{100 * value:7.2f}"

    return (
        f"{row['run'][-44:]:44}  {row['temperature']:11.2f}  {percent(row['greedy'])}  {percent(row['majority'])}  "
        f"{row['certain_rows']:7}  {percent(row['certain'])}  {percent(row['unsure'])}"
    )


def main() -> None:
    """Print a line a run and temperature; write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run directory")
    parser.add_argument("--samples", type=int, default=16, help="answers sampled a question (default 16)")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.5, 1.0], help="default 0.5 and 1.0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write JSON")
    args = parser.parse_args()
    print(f"{'run':44}  temperature   greedy  majority  certain  certain   unsure")
    print(f"{'':57}       %         %     rows        %        %")
    rows = [row for run in args.runs for row in measure(run, args)]
    if args.output:
        write_json(
            args.output,
            {"samples": args.samples, "seed": args.seed, "machine": machine(torch.device("cpu")), "rows": rows},
        )


if __name__ == "__main__":
    main()
