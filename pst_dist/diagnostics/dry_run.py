"""`pst run --dry-run`: every check that can be made before the first stage, in seconds, without writing anything.

It reads the rows, tokenises them for every arm, and runs the checks of `preflight` and `doctor` that concern this run.
All problems are reported, not only the first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pst_dist.config.run_dir import expand_arms, run_dir
from pst_dist.diagnostics.cost import Machines
from pst_dist.diagnostics.machine.findings import Finding, ok, problem, warning
from pst_dist.embedding.targets import needs_embeddings
from pst_dist.errors import DataError, PstError
from pst_dist.storage.manifest import read_manifest

if TYPE_CHECKING:
    from pst_dist.config.schema import Config
    from pst_dist.data.sample import ReasoningSample
    from pst_dist.data.sources.loaded import LoadedData

_LAID_OUT = 5_000
"""At most this many training rows are tokenised; a run of millions of rows would take minutes."""
_OF_DOCTOR = ("packages", "output_dir", "data_dir", "contents", "deepspeed", "encoder", "student", "plan")


@dataclass
class DryRun:
    """What was found, in the order of the stages."""

    findings: list[Finding] = field(default_factory=list)
    exit_code: int = 0
    """That of the first problem; 0 when the run can start."""

    def look(self, subject: str, check: Callable[[], Iterator[Finding]]) -> None:
        """Add the findings of a check; an error that it raises becomes a problem."""
        try:
            self.add(*check())
        except PstError as error:
            where = f"{error.where}: " if error.where else ""
            self.exit_code = self.exit_code or error.exit_code
            found = problem(subject, f"{where}{error.what}", error.remedy)
            if found.what not in {one.what for one in self.findings}:
                self.findings.append(found)

    def add(self, *findings: Finding) -> None:
        """Add findings; a problem without an error of its own is one of the machine."""
        self.findings += findings
        if not self.exit_code and any(finding.level == "problem" for finding in findings):
            self.exit_code = 4


def dry_run(config: Config) -> DryRun:
    """Check rows, student, encoder, lengths, places, disk and memory for every arm of the config."""
    from pst_dist.diagnostics.machine import examine
    from pst_dist.diagnostics.preflight import preflight

    found = DryRun()

    def settings() -> Iterator[Finding]:
        preflight(config)
        arms = ", ".join(arm.arm for arm in expand_arms(config))
        yield ok("config", f"{arms} in {config.output_dir}; student, layout and encoder can be loaded")

    found.look("config", settings)
    usable = found.exit_code == 0
    loaded: list[LoadedData] = []
    found.look("rows", lambda: _rows(config, loaded))
    if usable and loaded:
        for arm in expand_arms(config):
            found.look("lengths", lambda arm=arm: _lengths(arm, loaded[0].splits["train"]))  # type: ignore[misc]
    found.look("rate", lambda: _rate(config))
    machine_findings = examine.examine(
        config, examine.Request(Machines.model_validate({}), None, None), only=_OF_DOCTOR
    )[1]
    repeated = {finding.what for finding in found.findings}
    found.add(*(finding for finding in machine_findings if finding.what not in repeated))
    found.add(*_stages(config))
    return found


def _rows(config: Config, loaded: list[LoadedData]) -> Iterator[Finding]:
    from pst_dist.data.sources import load_data

    loaded.append(load_data(config))
    splits, rejects = loaded[0].splits, loaded[0].rejects
    counts = ", ".join(f"{name} {len(rows):,}" for name, rows in splits.items() if rows)
    bad = f"{len(rejects):,} bad rows, accepted by data.max_bad={config.data.max_bad}" if rejects else "no bad rows"
    yield ok("rows", f"{counts}; {bad}")
    if not splits["train"]:
        raise DataError("there are no training rows", "set data.train")
    if not splits[config.evaluate.split]:
        from pst_dist.diagnostics.preflight import no_rows

        raise no_rows(config.evaluate.split)


def _lengths(config: Config, samples: Sequence[ReasoningSample]) -> Iterator[Finding]:
    """Tokens of the rows, and how many rationales lose their end; raises for a row that does not fit at all."""
    from pst_dist.student.layout import layout_for
    from pst_dist.student.pretrained import is_encoder_decoder
    from pst_dist.student.tokenizer import build_tokenizer
    from pst_dist.training.begun import begun_settings, settled

    shown = samples[:_LAID_OUT]
    tokenizer = build_tokenizer(config.student, shown)
    config = settled(config, begun_settings(run_dir(config)), lambda: tokenizer)
    layout = layout_for(config, tokenizer, is_encoder_decoder=is_encoder_decoder(config.student))
    laid_out = [sequence for sample in shown for sequence in layout.sequences(sample)]
    lengths = [len(sequence.prompt_ids) + len(sequence.target_ids) for sequence in laid_out]
    cut = sum(sequence.truncated for sequence in laid_out)
    part = f"the first {len(shown):,} rows" if len(shown) < len(samples) else f"{len(shown):,} rows"
    text = (
        f"{config.arm}: {part}, median {statistics.median(lengths):.0f} tokens, longest {max(lengths)}, "
        f"layout.max_length {config.layout.max_length}"
    )
    if cut:
        share = 100 * cut / len(laid_out)
        yield warning("lengths", f"{text}; {cut} rationales ({share:.1f} %) lose their end", "raise layout.max_length")
    else:
        yield ok("lengths", f"{text}; nothing is cut")


def _rate(config: Config) -> Iterator[Finding]:
    """Whether the learning rate fits a pretrained student."""
    from pst_dist.training.engines.optimizer import high_rate

    if high := high_rate(config):
        yield warning("rate", high, f"train.learning_rate={config.student.learning_rate:g}")


def _stages(config: Config) -> Iterator[Finding]:
    """Which artefacts exist; a stage whose inputs have not changed is skipped."""
    run = run_dir(config)
    parts = [("shards", run.shards, "shards")]
    parts += [("embeddings", run.embeddings, "embeddings")] if needs_embeddings(config) else []
    for arm in expand_arms(config):
        parts.append((f"{arm.arm} trained", run_dir(arm).best, "student"))
    there = [name for name, folder, kind in parts if _exists(folder, kind)]
    missing = [name for name, folder, kind in parts if not _exists(folder, kind)]
    if there:
        yield ok("stages", f"found: {', '.join(there)}; kept if made from the same inputs")
    if missing:
        yield ok("stages", f"to do: {', '.join(missing)}, then scores, export and report")


def _exists(folder: Path, kind: str) -> bool:
    try:
        return read_manifest(folder, kind) is not None
    except PstError:
        return False
