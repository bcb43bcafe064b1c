"""The README.md of an exported student: Hub metadata, how to use it, its scores, and what it was made from.

The metadata is huggingface_hub's `ModelCardData`; the text is in `templates/model_card.md`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pst_dist.arms import ARMS
from pst_dist.evaluation.explanations import explanation_rows
from pst_dist.evaluation.scores import per_correct
from pst_dist.publish.card_code import answer_code, prompt_text, rationale_code, thinking_code
from pst_dist.publish.card_facts import CardFacts, lineage, settings_text, synthetic_words, training_words
from pst_dist.publish.render import render
from pst_dist.student.chat import NEXT, SYSTEM
from pst_dist.student.warm_start import warm_shape

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

__all__ = ["CardFacts", "card_data", "model_card"]


def model_card(facts: CardFacts) -> str:
    """The whole README.md."""
    fmt, arm = facts.format, ARMS[facts.format.arm]
    explained = [row for row in facts.evaluations if row.get("explanations")]
    body = render(
        "model_card.md",
        facts=facts,
        format=fmt,
        arm=arm,
        parameters=sum(parameter.numel() for parameter in facts.model.parameters()),
        training=training_words(facts),
        prompt=prompt_text(facts).replace("\n", "\\n"),
        separator=" " if facts.seq2seq else fmt.separator.replace("\n", "\\n"),
        conversations=_conversations(fmt.turns or {}),
        shows_semantic_token=arm.aligned and (fmt.semantic_before or fmt.writes_rationale),
        answer_code=answer_code(facts),
        rationale_code=rationale_code(facts),
        thinking_code=thinking_code(facts),
        score_rows=[_score_cells(row) for row in _with_sources(facts.evaluations)],
        explained=[f"{row['task']} {row['split']}" for row in explained],
        explanation_rows=explanation_rows([row["explanations"] for row in explained]),
        devices=" and ".join(dict.fromkeys(row["device"] for row in facts.evaluations)),
        # Training records validation scores; without validation rows it keeps the last step and records none.
        chosen=any(facts.student.extra.get(metric) is not None for metric in ("answer_nll", "accuracy")),
        lineage=lineage(facts),
        settings=settings_text(facts),
        made_up=synthetic_words(facts),
        lower_case=warm_shape(facts.config.student) is not None,
    )
    return f"---\n{card_data(facts).to_yaml()}\n---\n\n{body}"


def _conversations(turns: Mapping[str, str]) -> str:
    """What else the chat template puts into the prompt, in words."""
    held = [words for key, words in ((SYSTEM, "a system message"), (NEXT, "earlier messages")) if key in turns]
    return f"It also accepts {' and '.join(held)}." if held else "It accepts no other messages."


def card_data(facts: CardFacts) -> ModelCardData:
    """The card's metadata; `ModelCard.load` reads it back from the card."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=_pipeline(facts),
        tags=[
            "pst-dist",
            "reasoning",
            "distillation",
            "answer-first",
            facts.format.arm.replace("_", "-"),
            *(["lora"] if facts.config.student.lora.rank else []),
        ],
        license=facts.licence,
        base_model=facts.base_model,
        datasets=facts.datasets or None,
        model_name=facts.name if facts.evaluations else None,
        eval_results=[result for row in _with_sources(facts.evaluations) for result in _eval_results(facts, row)]
        or None,
    )


def _with_sources(evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations, each of a mixture followed by the scores of its sources under their names."""
    found = []
    for results in evaluations:
        found.append(results)
        for name, part in (results.get("sources") or {}).items():
            unmeasured = {"chance": None, "milliseconds_to_answer": None, "source": None}
            found.append({**results, **part, **unmeasured, "task": name})
    return found


def _pipeline(facts: CardFacts) -> str:
    return "text2text-generation" if facts.seq2seq else "text-generation"


def _eval_results(facts: CardFacts, results: dict[str, Any]) -> list[EvalResult]:
    """The metrics of one evaluation."""
    from huggingface_hub import EvalResult

    metrics = (
        ("accuracy", 100 * results["accuracy"], "accuracy (%)"),
        ("accuracy_stderr", 100 * results["accuracy_stderr"], "standard error of the accuracy (points)"),
        ("tokens_to_answer", results["tokens_to_answer"]["mean"], "mean tokens generated up to the end of the answer"),
    )
    return [
        EvalResult(
            task_type=_pipeline(facts),
            task_name="question answering",
            dataset_type=results["task"],
            dataset_name=results["task"],
            dataset_split=results["split"],
            metric_type=kind,
            metric_value=round(value, 2),
            metric_name=name,
        )
        for kind, value, name in metrics
    ]


def _score_cells(row: dict[str, Any]) -> list[str]:
    latency = row["milliseconds_to_answer"]
    known = (row.get("source") or {}).get("in_training")
    return [
        f"{row['task']} {row['split']}" + (f" ({known} of its questions are training questions)" if known else ""),
        str(row["rows"]),
        f"{100 * row['accuracy']:.2f} %",
        f"{100 * row['accuracy_stderr']:.2f}",
        "unknown" if row["chance"] is None else f"{100 * row['chance']:.1f} %",
        f"{row['tokens_to_answer']['mean']:.1f}",
        f"{latency['median']:.0f}" if latency else "not measured",
        per_correct(row)[0],
    ]
