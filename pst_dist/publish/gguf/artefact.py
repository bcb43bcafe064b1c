"""Publishes `RUN/gguf/TYPE`: an export's GGUF file, a Modelfile for Ollama, and a card that says what was compared.

The file is made from the export, so it has the same weights, tokenizer and chat template. Where the package xllamacpp
is installed, llama.cpp must load it and read the test questions as the same tokens before anything is published, and
its answers are compared with those of `pst evaluate`.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pst_dist.arms import ARMS
from pst_dist.config.run_dir import RunDir, run_dir
from pst_dist.config.schema import Config
from pst_dist.data.tasks import get_task
from pst_dist.errors import EnvironmentFault
from pst_dist.evaluation.evaluate import RESULTS, SAMPLES, finished_evaluation
from pst_dist.evaluation.records import read_results, read_rows, student_of
from pst_dist.logs import progress
from pst_dist.publish.card_facts import CardFacts, lineage, training_words
from pst_dist.publish.gguf.comparison import SLOTS, Comparison, asked_in, compare_answers, server_prompt
from pst_dist.publish.gguf.engine import PROBES, check_tokens, running
from pst_dist.publish.gguf.file import About, write_gguf
from pst_dist.publish.gguf.server import PACKAGE, engine_version
from pst_dist.publish.gguf.vocabulary import Vocabulary, vocabulary_of
from pst_dist.publish.render import render
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.atomic import write_text
from pst_dist.storage.manifest import digest_of
from pst_dist.student.contexts import max_positions
from pst_dist.student.saved import LoadedStudent, load_student

log = logging.getLogger(__name__)
_VERSION = 1


@dataclass(frozen=True)
class Exported:
    """A published GGUF file."""

    file: Path
    comparison: Comparison | None
    """None when nothing was compared; the log says why."""

    def lines(self) -> list[str]:
        """What the command line prints."""
        size = f"{self.file} ({self.file.stat().st_size / 2**20:.1f} MiB)"
        return [size, f"  {self.comparison.line()}"] if self.comparison else [size]


def export_gguf(config: Config, kind: str, *, compare_rows: int = 200, rebuild: bool = False) -> Exported:
    """Write `RUN/gguf/KIND` for the finished export of a run; does nothing when the same one already exists.

    At most `compare_rows` scored rows are compared. Raises InputError when there is no export, ConfigError for a
    student that llama.cpp does not compute in the same way, and EnvironmentFault when a package is missing.
    """
    _need_gguf()
    run = run_dir(config)
    student = load_student(run.export, device="cpu")
    recorded, why_not = _recorded(run, student, compare_rows)
    engine = engine_version()
    fingerprint = digest_of(
        {
            "version": _VERSION,
            "export": student.manifest.digest,
            "kind": kind,
            "engine": engine,
            "rows": recorded,
            "max_new_tokens": config.evaluate.max_new_tokens,
        }
    )
    artefact = Artefact(run.path / "gguf" / kind, "gguf")
    if not rebuild and (done := artefact.finished(fingerprint)) is not None:
        log.info("%s is complete, nothing to do", artefact.directory)
        (name,) = (name for name in done.files if name.endswith(".gguf"))
        counts = done.extra["comparison"]
        return Exported(artefact.directory / name, Comparison(**counts) if counts else None)
    rows = student.model.get_input_embeddings().weight.shape[0]
    vocabulary = vocabulary_of(student.tokenizer, rows=rows, stop_token=student.format.stop_token)
    chain = {key: student.manifest.extra.get(key) for key in ("shards", "embeddings")}
    licence = student.manifest.extra.get("licence")
    facts = CardFacts(config, student.format, student.manifest, [], None, chain, student.model, licence=licence)
    name = f"{facts.name}-{kind}.gguf"
    extra = {"export": student.manifest.digest, "student": student.manifest.extra["student"], "type": kind}
    with artefact.publish(fingerprint, extra) as draft:
        started = time.perf_counter()
        tensors = write_gguf(
            draft.path / name,
            student.model,
            vocabulary,
            _about(facts),
            kind=kind,
            template=student.tokenizer.chat_template,
        )
        log.info("wrote %s in %.1f s", name, time.perf_counter() - started)
        comparison = None
        if engine is not None:
            comparison = _checked(draft.path / name, student, vocabulary, config, recorded)
        else:
            why_not = f"the package {PACKAGE} is not installed: pip install 'pst-dist[llama-cpp]'"
        if comparison is None:
            log.warning("%s was not compared with transformers: %s", name, why_not)
        draft.extra |= {"tensors": tensors, "engine": engine, "comparison": comparison and comparison.to_json()}
        write_text(draft.path / "Modelfile", modelfile(name, student))
        write_text(
            draft.path / "README.md",
            _card(facts, name, draft.extra, comparison, why_not, vocabulary, (draft.path / name).stat().st_size),
        )
    return Exported(artefact.directory / name, comparison)


def _need_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise EnvironmentFault("writing a GGUF file needs the package gguf", "pip install 'pst-dist[gguf]'") from error


def _recorded(run: RunDir, student: LoadedStudent, most: int) -> tuple[list[dict[str, Any]], str]:
    """(the rows that `pst evaluate` scored with this student, why there are none)."""
    if most < 1:
        return [], "no rows were asked for (--compare-rows)"
    folder = run.evaluation("test")
    if finished_evaluation(folder) is None:
        return [], "its test rows have not been scored: run `pst evaluate`"
    results = read_results(folder / RESULTS)
    if student_of(results) != student.manifest.extra.get("student"):
        return [], "its scores belong to another student: run `pst evaluate` again"
    if ARMS[student.format.arm].chooses_order:
        return [], "an adaptive student decides row by row whether to think first, which a server does not"
    rows = read_rows(folder / SAMPLES)[:most]
    if not all(isinstance(row.get("answer_text"), str) for row in rows):
        return [], "its scores are of an older version: run `pst evaluate --rebuild`"
    return rows, ""


def _checked(
    file: Path, student: LoadedStudent, vocabulary: Vocabulary, config: Config, rows: list[dict[str, Any]]
) -> Comparison | None:
    """Load the file in llama.cpp, compare tokens, and answers where there are rows."""
    fmt, most = student.format, config.evaluate.max_new_tokens
    positions = max_positions(student.model) or fmt.max_length + most
    context = min(positions, fmt.max_length + most)
    with running(file, slots=SLOTS, context=context) as engine:
        questions = [*PROBES, *(asked_in(row) for row in rows)]
        prompts = [server_prompt(fmt, question) for question in questions]
        check_tokens(engine, student.tokenizer, prompts, normalises=vocabulary.normalises)
        if not rows:
            return None
        task = get_task(config.task, config.data.answer_type)
        with progress("compare with transformers", total=len(rows), unit="rows") as bar:
            return compare_answers(engine, fmt, task, rows, max_new_tokens=most, on_row=bar.advance)


def _about(facts: CardFacts) -> About:
    return About(
        name=facts.name,
        description=f"A student {training_words(facts)}. It stops after the answer.",
        tags=("pst-dist", "reasoning", "distillation", facts.format.arm.replace("_", "-")),
        base_model=facts.base_model,
        licence=facts.licence,
    )


def modelfile(name: str, student: LoadedStudent) -> str:
    """A Modelfile for Ollama: the trained prompt as a Go template, greedy decoding, the stop as text too.

    Ollama does not run Jinja, so the prompt is written out; it adds the BOS itself.
    """
    before, after = student.format.render("\0").split("\0")
    if student.format.semantic_before:
        after += student.format.semantic_token * student.format.semantic_tokens
    template = f"{_go(before)}{{{{ .Prompt }}}}{_go(after)}"
    context = max_positions(student.model) or 2 * student.format.max_length
    return "\n".join(
        [
            "# ollama create NAME -f Modelfile",
            f"FROM ./{name}",
            f'TEMPLATE """{template}"""',
            f"PARAMETER stop {json.dumps(student.format.stop_token)}",
            "PARAMETER temperature 0",
            f"PARAMETER num_ctx {context}",
            "",
        ]
    )


def _go(text: str) -> str:
    """Text in a Go template within triple quotes: braces and quotes as a Go string."""
    if "{{" in text or '"""' in text or text.endswith('"') or text.endswith("{"):
        return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}"
    return text


def _card(
    facts: CardFacts,
    name: str,
    extra: dict[str, Any],
    comparison: Comparison | None,
    why_not: str,
    vocabulary: Vocabulary,
    size: int,
) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="llama.cpp",
        pipeline_tag="text-generation",
        license=facts.licence,
        base_model=facts.base_model,
        datasets=facts.datasets or None,
        tags=["gguf", "pst-dist", "reasoning", "distillation", facts.format.arm.replace("_", "-")],
    )
    body = render(
        "gguf_card.md",
        facts=facts,
        format=facts.format,
        file=name,
        size=f"{size / 2**20:.1f} MiB",
        kind=extra["type"],
        tensors=", ".join(f"{count} x {kind}" for kind, count in sorted(extra["tensors"].items())),
        engine=extra["engine"],
        comparison=comparison,
        why_not=why_not,
        normalises=vocabulary.normalises,
        training=training_words(facts),
        lineage=[*lineage(facts)[:-1], ("student", f"`{extra['student']}`"), ("export", f"`{extra['export']}`")],
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"
