"""The verb `pst answer`: one question on the command line, lines from standard input, or a whole file of questions."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pst_dist.cli.verb import REBUILD, Option, positive_whole, verb
from pst_dist.errors import ConfigError

if TYPE_CHECKING:
    from pst_dist.config.schema import RayConfig
    from pst_dist.student.answer import Answer
    from pst_dist.student.saved import LoadedStudent


def _more() -> str:
    return (
        "Many questions: pst answer RUN --input questions.jsonl --output answers.jsonl [--explain] [--confidence]\n"
        "A row's question is a text or a list of turns that ends with it (columns question, prompt, messages, turns).\n"
        "Each output line has the columns of its row, and student_answer, student_complete and student_tokens.\n"
        "If it is interrupted, run the same command again to resume. on=ray answers on a Ray cluster;\n"
        "ray.num_actors=N, ray.address=... and ray.num_gpus_per_actor=N mean the same as in embed.ray."
    )


@verb(
    "ask a trained student one question, or a file of questions",
    'pst answer runs/demo/pst "question" --explain',
    Option("config", metavar="RUN", help="run directory, or an exported model"),
    Option(
        "words",
        nargs="*",
        default=None,
        metavar="question",
        help="the question, or - to read one per line from standard input",
    ),
    Option(
        "--input", metavar="ROWS", help="rows with questions, as in data.test; - reads JSON Lines from standard input"
    ),
    Option("--output", metavar="FILE.jsonl", help="where to write the answers; - writes to standard output"),
    Option("--question", metavar="COLUMN", help="column, nested path or template of the question (default: guessed)"),
    Option("--skip-bad", action="store_true", help="leave out rows without a usable question"),
    Option("--explain", action="store_true", help="also write the rationale"),
    Option("--confidence", action="store_true", help="also write the probability that the student gives its answer"),
    Option("--batch-size", type=positive_whole, default=64, metavar="N", help="questions per batch (%(default)s)"),
    Option("--max-new-tokens", type=positive_whole, default=256, metavar="N", help="tokens per answer (%(default)s)"),
    Option(
        "--think-below",
        type=float,
        metavar="P",
        help="for the arm adaptive: think first when the probability of the immediate answer is below this (0 never, 2 "
        "always; default: the threshold that `pst evaluate` chose)",
    ),
    REBUILD,
    more=_more,
)
def answer(arguments: argparse.Namespace) -> int:
    from pst_dist.evaluation.asking import student_folder, threshold_of
    from pst_dist.student.saved import load_student

    question, ray = _split(arguments.words)
    if (question is None) == (arguments.input is None):
        raise ConfigError(
            "needs a question or --input, not both", 'pst answer RUN "question", or RUN --input questions.jsonl'
        )
    if arguments.input is None and (ray is not None or arguments.output is not None):
        raise ConfigError("on=ray and --output are for a file of questions", "name it with --input")
    folder = student_folder(Path(arguments.config))
    student = load_student(folder, "cpu" if ray is not None else None)
    think_below = threshold_of(student, arguments.think_below)
    if arguments.input is not None:
        return _answer_file(arguments, student, folder, think_below, ray)
    for line in sys.stdin if question == "-" else [question]:
        _tell(arguments, student, str(line).strip(), think_below)
    return 0


def _split(words: list[str]) -> tuple[str | None, RayConfig | None]:
    """(the question, the settings of Ray for on=ray) among the words; raises ConfigError for more than one question."""
    from pst_dist.config.overrides import parse_override
    from pst_dist.config.schema import RayConfig

    settings, ray, questions = {}, False, []
    for word in words:
        if word in ("on=ray", "on=local"):
            ray = word == "on=ray"
        elif word.startswith("ray.") and "=" in word:
            place, value = parse_override(word)
            settings[".".join(place[1:])] = value
        else:
            questions.append(word)
    if len(questions) > 1:
        raise ConfigError(f"{len(questions)} questions were given", "put the question in quotes")
    if settings and not ray:
        raise ConfigError(f"ray.{next(iter(settings))} has no effect without on=ray", "add on=ray, or leave it out")
    return (questions[0] if questions else None), RayConfig(**settings) if ray else None


def _answer_file(
    arguments: argparse.Namespace, student: LoadedStudent, folder: Path, think_below: float, ray: RayConfig | None
) -> int:
    from pst_dist.answering.files import STREAM, AnswerJob, answer_file
    from pst_dist.answering.windows import AnswerSettings

    if arguments.output is None:
        raise ConfigError("--output is missing", "name the file for the answers, or - for standard output")
    if ray is not None and arguments.output == STREAM:
        raise ConfigError("on=ray needs a file for the answers", "name it with --output")
    settings = AnswerSettings(
        explain=arguments.explain,
        confidence=arguments.confidence,
        max_new_tokens=arguments.max_new_tokens,
        batch_size=arguments.batch_size,
        think_below=think_below,
    )
    job = AnswerJob(arguments.input, arguments.output, arguments.question, arguments.skip_bad, settings)
    answerer = None
    if ray is not None:
        from pst_dist.clusters.ray.answer import on_ray

        answerer = on_ray(folder, Path(arguments.output), settings, ray)
    done = answer_file(job, student, answerer=answerer, rebuild=arguments.rebuild)
    if arguments.output != STREAM:
        skipped = f", {done.skipped} rows skipped" if done.skipped else ""
        print(f"{done.output}: {done.rows} answers{skipped}")
    return 0


def _tell(arguments: argparse.Namespace, student: LoadedStudent, question: str, think_below: float) -> None:
    """Ask one question and print the answer; on a terminal, while it is generated."""
    from pst_dist.student.ask import answer_question

    live = sys.stdout.isatty()
    begun = False

    def show(text: str) -> None:
        nonlocal begun
        text = text if begun else text.lstrip()
        begun = begun or bool(text)
        print(text, end="", flush=True)

    answer = answer_question(
        student,
        question,
        explain=arguments.explain,
        max_new_tokens=arguments.max_new_tokens,
        think_below=think_below,
        on_text=show if live else None,
    )
    print("" if live else answer.text)
    if arguments.explain:
        print(f"because: {answer.rationale or _silent(student, answer)}")
    if arguments.confidence:
        print(f"confidence: {answer.confidence:.3f} per token, {answer.probability:.3f} for the whole answer")
    logging.getLogger("pst_dist").info(
        "%d tokens, %.1f ms to the answer%s",
        answer.tokens,
        1000 * answer.seconds,
        ", thought first" if think_below and answer.thought_first else "",
    )


def _silent(student: LoadedStudent, answer: Answer) -> str:
    """Why there is no rationale."""
    silent = "wrote none" if student.format.writes_rationale else "was not trained to explain"
    return f"(this student {silent if answer.complete else 'did not finish its answer'})"
