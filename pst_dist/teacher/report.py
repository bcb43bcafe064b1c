"""How good the teacher's samples are: the share kept by prompt, lengths, cut replies, and how much samples agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pst_dist.data.tasks import Task
from pst_dist.teacher.judging import VERDICTS, Answered, Sample, group_answers


def quality(answered: Sequence[Answered], task: Task) -> dict[str, Any]:
    """The quality of the samples, as in report.json: all together, and for each prompt."""
    samples = [sample for one in answered for sample in one.samples]
    prompts = list(dict.fromkeys(sample.prompt for sample in samples))
    by_prompt = {
        name: _of_samples([one for one in samples if one.prompt == name])
        | _of_questions([_only(one, name) for one in answered], task)
        for name in prompts
    }
    return {
        "task": task.name,
        "questions": len(answered),
        "questions_kept": sum(bool(one.kept) and one.answer is not None for one in answered),
        **_of_samples(samples),
        **_of_questions(answered, task),
        "by_prompt": by_prompt,
    }


def _only(one: Answered, prompt: str) -> Answered:
    samples = tuple(sample for sample in one.samples if sample.prompt == prompt)
    return Answered(question=one.question, answer=one.answer, samples=samples)


def _of_samples(samples: Sequence[Sample]) -> dict[str, Any]:
    counts = Counter(sample.verdict for sample in samples)
    kept = [sample for sample in samples if sample.verdict == "kept"]
    return {
        "samples": len(samples),
        "kept": counts["kept"],
        "share_kept": _share(counts["kept"], len(samples)),
        "verdicts": {name: counts[name] for name in VERDICTS if counts[name]},
        "only_thoughts": sum(one.verdict == "no_rationale" and one.thought for one in samples),
        "words_in_a_kept_rationale": _spread([len(sample.rationale.split()) for sample in kept]),
        "tokens_of_a_sample": _spread([sample.tokens for sample in samples]),
    }


def _of_questions(answered: Sequence[Answered], task: Task) -> dict[str, Any]:
    """Agreement: of the samples of a question, the share that give its most frequent answer; the mean over questions.

    None unless questions have several samples. `majority_right` is the share of questions with a gold answer whose most
    frequent answer is right.
    """
    shares, right, scored = [], 0, 0
    for one in answered:
        asked = [sample for sample in one.samples if not sample.told]
        if not asked:
            continue
        most = max(group_answers(asked, task), key=len, default=[])
        if len(asked) > 1:
            shares.append(len(most) / len(asked))
        if one.question.gold is not None:
            scored += 1
            right += bool(most) and task.is_correct(most[0].answer, one.question.gold)
    return {
        "agreement": round(sum(shares) / len(shares), 4) if shares else None,
        "majority_right": _share(right, scored) if scored else None,
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _spread(values: list[int]) -> dict[str, float] | None:
    """Mean, median, 95th percentile and largest value."""
    if not values:
        return None
    ordered = sorted(values)
    return {
        "mean": round(sum(ordered) / len(ordered), 1),
        "median": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "most": ordered[-1],
    }


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    found = report["quality"]
    lines = [f"{'prompt':<20} {'samples':>8} {'kept':>6} {'share':>7} {'cut':>5} {'words':>6} {'agree':>6}  dropped"]
    for name, one in [*found["by_prompt"].items(), ("all", found)]:
        dropped = [f"{verdict} {count}" for verdict, count in one["verdicts"].items() if verdict not in ("kept", "cut")]
        words = one["words_in_a_kept_rationale"]
        lines.append(
            f"{name:<20} {one['samples']:>8} {one['kept']:>6} {_percent(one['share_kept']):>7} "
            f"{one['verdicts'].get('cut', 0):>5} {words['median'] if words else '-':>6} "
            f"{_percent(one['agreement']):>6}  {', '.join(dropped)}"
        )
    if len(found["by_prompt"]) == 1:
        lines.pop()
    lines.append(f"{found['task']}: {found['questions_kept']:,} of {found['questions']:,} questions have a rationale")
    if found.get("only_thoughts"):
        lines.append(
            f"{found['only_thoughts']:,} right answers have their reasoning only in the thought: the same command with "
            "--thoughts keep uses it"
        )
    if (new := report.get("new_questions")) is not None:
        why_not = ", ".join(f"{why.replace('_', ' ')} {count}" for why, count in new["dropped"].items())
        lines.append(
            f"new questions: {new['kept']:,} kept of {new['proposed']:,} proposed ({why_not or 'none dropped'})"
        )
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
