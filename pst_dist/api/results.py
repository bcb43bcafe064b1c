"""The results that the Python API returns: plain values with units, convertible to a pandas frame.

Everything is read from the run directory, where the stages have written it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_dist.errors import EnvironmentFault

if TYPE_CHECKING:
    import pandas

    from pst_dist.config.schema import Config
    from pst_dist.evaluation.compare import Comparison
    from pst_dist.training.result import TrainingResult


def frame_of(rows: Iterable[Mapping[str, Any]]) -> pandas.DataFrame:
    """A pandas frame with one row per mapping; raises EnvironmentFault without pandas."""
    try:
        import pandas
    except ImportError as error:
        raise EnvironmentFault("to_frame needs pandas", "pip install pandas") from error
    return pandas.DataFrame(list(rows))


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished training of one arm."""

    arm: str
    output_dir: Path
    student: Path
    """The folder of the best student; `load_student` reads it."""
    steps: int
    """Optimizer steps."""
    seconds: float
    """Training time over all starts, excluding validation and checkpoints."""
    tokens: int
    """Tokens of all sequences trained on, excluding padding."""
    metric: str
    """The metric that chose the best step: answer_nll or accuracy."""
    best_step: int
    best_value: float | None
    """The metric at the best step; None without validation rows."""
    history: tuple[dict[str, Any], ...] = field(repr=False)
    """A dict for each logged step: step, epoch, loss, the raw terms (answer_nll, rationale_nll, alignment) and more."""
    validation: tuple[dict[str, Any], ...] = field(repr=False)
    """A dict for each validation: step and the metrics."""

    def to_frame(self) -> pandas.DataFrame:
        """The history, one row per logged step."""
        return frame_of(self.history)

    @classmethod
    def of(cls, config: Config, record: TrainingResult) -> TrainResult:
        """From a training's record and the metrics it wrote."""
        from pst_dist.config.run_dir import run_dir
        from pst_dist.storage.manifest import read_lines

        run = run_dir(config)
        lines = read_lines(run.metrics)
        return cls(
            arm=config.arm,
            output_dir=run.path,
            student=run.best,
            steps=record.steps,
            seconds=record.seconds,
            tokens=record.tokens,
            metric=record.metric,
            best_step=record.best_step,
            best_value=record.best_value,
            history=tuple(line for line in lines if "loss" in line),
            validation=tuple({"step": line["step"], **line["validation"]} for line in lines if "validation" in line),
        )


@dataclass(frozen=True, kw_only=True)
class ScoredRow:
    """One row that was decoded and scored."""

    id: str
    question: str
    gold: str
    prediction: str | None
    """The parsed answer; None if the text contains none."""
    answer_text: str
    """The student's answer as generated."""
    correct: bool
    answer_tokens: int
    complete: bool
    """Whether the answer ended with its stop token."""
    rationale: str | None = None
    """The student's, for the first evaluate.explain_rows rows of arms that write one."""
    teacher_rationale: str | None = None
    similarity: float | None = None
    """Cosine of the two rationales' centred embeddings."""
    thought_first: bool | None = None
    """Adaptive students only: whether it thought before this answer."""
    probability_at_once: float | None = None
    """Adaptive students only: the probability of the immediate answer."""
    part: str | None = None
    """Mixtures only: the source that the row belongs to."""
    in_training: bool | None = None
    """Scores of other rows only: whether the question is also in the training rows."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One student's scores on the rows of one split."""

    arm: str
    task: str
    split: str
    """test or validation; for other rows the name of their folder below eval."""
    output_dir: Path
    count: int
    """Rows scored."""
    correct: int
    accuracy: float
    """Share of correct answers, 0 to 1."""
    accuracy_stderr: float
    """Its binomial standard error, sqrt(p (1 - p) / n)."""
    chance: float | None
    """Expected accuracy of blind guessing; None when the allowed answers cannot be counted."""
    majority: float
    """Accuracy of always giving the most frequent answer."""
    unparsed: int
    """Rows whose text contains no answer."""
    incomplete: int
    """Rows whose answer did not reach its stop token."""
    tokens: float
    """Mean tokens to the answer."""
    tokens_stderr: float
    """Standard error of that mean."""
    milliseconds: float | None
    """Median wall time to the answer, one question at a time; None if not measured."""
    rationale_similarity: float | None
    """Mean cosine to the teacher's rationales; None if not measured."""
    rows: tuple[ScoredRow, ...] = field(repr=False)
    details: dict[str, Any] = field(repr=False)
    """All of results.json: percentiles, device, digests, the training's summary; `source` for other rows,
    `sources` with the scores of each source of a mixture."""

    def to_frame(self) -> pandas.DataFrame:
        """One row per scored row."""
        return frame_of(asdict(row) for row in self.rows)

    @classmethod
    def of(cls, config: Config, results: dict[str, Any]) -> EvaluationResult:
        """From an evaluation's results and the scored rows it wrote."""
        from pst_dist.config.run_dir import run_dir
        from pst_dist.evaluation.evaluate import SAMPLES
        from pst_dist.storage.manifest import read_lines

        run, split = run_dir(config), results["split"]
        known = {one.name for one in fields(ScoredRow)}
        rows = read_lines(run.evaluation(split) / SAMPLES)
        latency, similarity = results["milliseconds_to_answer"], results["rationale_similarity"]
        return cls(
            arm=results["arm"],
            task=results["task"],
            split=split,
            output_dir=run.path,
            count=results["rows"],
            correct=results["correct"],
            accuracy=results["accuracy"],
            accuracy_stderr=results["accuracy_stderr"],
            chance=results["chance"],
            majority=results["majority"],
            unparsed=results["unparsed"],
            incomplete=results["incomplete"],
            tokens=results["tokens_to_answer"]["mean"],
            tokens_stderr=results["tokens_to_answer"]["stderr"],
            milliseconds=latency["median"] if latency else None,
            rationale_similarity=similarity["mean"] if similarity else None,
            rows=tuple(ScoredRow(**{name: row[name] for name in row if name in known}) for row in rows),
            details=results,
        )


@dataclass(frozen=True, kw_only=True)
class TeachResult:
    """What a teacher wrote."""

    path: Path
    """The rows with rationales, JSON Lines, to use as data.train."""
    folder: Path
    """The journal, the report, and the replies that were not kept."""
    rows: tuple[dict[str, Any], ...] = field(repr=False)
    """The rows as written."""
    report: dict[str, Any] = field(repr=False)
    """All of report.json: quality by prompt, and the ledger of requests, tokens and cost."""
    cap: str | None
    """The cap that ended the job early (`--max-cost 5`); None if everything was asked."""

    def to_frame(self) -> pandas.DataFrame:
        """One row per question."""
        return frame_of(self.rows)


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """One arm of a finished run."""

    arm: str
    config: Config = field(repr=False)
    """This arm's config, to pass to `evaluate`, `export` and `train`."""
    output_dir: Path
    training: TrainResult
    evaluation: EvaluationResult
    """Scores on the split named by evaluate.split, by default the test rows."""
    export: Path
    """A folder that plain transformers loads."""
    report: Path
    """An HTML page."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """A finished run: one or more arms, trained and scored on identical rows."""

    config: Config = field(repr=False)
    output_dir: Path
    arms: tuple[ArmResult, ...]
    report: Path
    """The HTML page of the run; with several arms, the page that compares them."""

    def __getitem__(self, arm: str) -> ArmResult:
        """The arm of this name; raises KeyError listing the arms of the run."""
        for one in self.arms:
            if one.arm == arm:
                return one
        raise KeyError(f"no arm {arm!r} in this run; it has {', '.join(one.arm for one in self.arms)}")

    def __iter__(self) -> Iterator[ArmResult]:
        return iter(self.arms)

    def to_frame(self) -> pandas.DataFrame:
        """One row per arm: its scores, tokens and training."""
        return frame_of(
            {
                "arm": one.arm,
                "task": one.evaluation.task,
                "split": one.evaluation.split,
                "rows": one.evaluation.count,
                "accuracy": one.evaluation.accuracy,
                "accuracy_stderr": one.evaluation.accuracy_stderr,
                "chance": one.evaluation.chance,
                "tokens": one.evaluation.tokens,
                "tokens_stderr": one.evaluation.tokens_stderr,
                "milliseconds": one.evaluation.milliseconds,
                "unparsed": one.evaluation.unparsed,
                "steps": one.training.steps,
                "best_step": one.training.best_step,
                "best_value": one.training.best_value,
                "training_seconds": one.training.seconds,
                "training_tokens": one.training.tokens,
                "output_dir": str(one.output_dir),
            }
            for one in self.arms
        )

    def compare(self) -> Comparison:
        """The arms side by side with paired tests on the same rows; `print(result.compare().table())`.

        Raises InputError for a run of a single arm.
        """
        from pst_dist.evaluation.compare import compare

        return compare([one.output_dir for one in self.arms])
