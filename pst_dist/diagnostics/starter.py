"""A config to begin with, from rows: `pst check rows.jsonl --write my.yaml`.

It has what the rows say: their file, the column map and type of answer that `pst check` proposes, a test split, and the
arms that they can train.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pst_dist.config.loading import load_config
from pst_dist.config.overrides import parse_override, set_key
from pst_dist.data.sources.context import ADD_COLUMN
from pst_dist.data.sources.rows import Reject
from pst_dist.diagnostics.rows import CheckReport, check
from pst_dist.errors import ConfigError, DataError, InputError, PstError
from pst_dist.storage.atomic import write_text
from pst_dist.text.redaction import has_secret

_PLACEHOLDER = "COLUMN"
_SUFFIXES = (".yaml", ".yml")


def run_folder(path: Path) -> str:
    """The run directory in the config at `path`."""
    return f"runs/{path.stem}"


def check_target(path: Path, files: Sequence[str]) -> None:
    """Raises InputError for a config that exists already, and ConfigError for a name that is not a YAML file's, for no
    files, and for a URL whose secret would be saved."""
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"--write {path}: a config is a YAML file", "for example --write my.yaml")
    if path.exists() or path.is_symlink():
        raise InputError("exists and will not be overwritten", "give --write another name", path=path)
    if not files:
        raise ConfigError("--write makes a config from rows, and this is a config", "name a file of rows")
    if any(map(has_secret, files)):
        raise ConfigError("--write would save the secret in a URL", "take it from the environment, or write the config")


def write_starter(
    path: Path, files: Sequence[str], overrides: Sequence[str], report: CheckReport, rejects: Path | None = None
) -> CheckReport:
    """Write the config for these files, given the report on them; returns the report on the config.

    `overrides` are words like those of `pst check`. Raises DataError, the report's own error, when there is no column
    for the question or the answer, and for a column that the question may depend on: the guessed map refuses such a
    row, but a map in a config is the user's own word.
    """
    proposed = (yaml.safe_load(report.proposal) or {}).get("data", {}) if report.proposal else {}
    columns = proposed.get("columns", {})
    if report.problem is not None and isinstance(columns, dict) and _PLACEHOLDER in columns.values():
        raise report.problem
    if isinstance(columns, dict) and report.loaded is not None:
        _refuse_unread(columns, report.loaded.rejects)
    data = {"train": files[0] if len(files) == 1 else list(files), "test_size": 0.1, **proposed}
    if report.answer_type:
        data["answer_type"] = report.answer_type
    explained = _maps_rationale(columns, overrides) or _has_rationales(report)
    unused = report.loaded.report.get("unused_text_columns", []) if report.loaded is not None else []
    try:
        write_text(path, _text(path, data, overrides, explained, unused))
        found = check(load_config(str(path)), rejects)
        if explained and found.loaded is not None:
            if found.loaded.splits["train"] and not _has_rationales(found):  # the column is empty
                write_text(path, _text(path, data, overrides, False, unused))
                found = check(load_config(str(path)), rejects)
    except PstError:
        path.unlink(missing_ok=True)  # else the corrected command would find it in its way
        raise
    return found


def _has_rationales(report: CheckReport) -> bool:
    """Whether some training row that was kept has a rationale, of its own or in its reply."""
    if report.loaded is None:
        return False
    return len(report.loaded.splits["train"]) > report.loaded.report["train_without_rationale"]


def _refuse_unread(columns: dict[str, str], rejects: Sequence[Reject]) -> None:
    """Raises DataError for the first row that only a guessed map refuses: it would leave out a column of it, or take a
    whole solution for its answer."""
    reject = next((one for one in rejects if one.code in ("unread", "unmarked")), None)
    if reject is None:
        return
    if ADD_COLUMN not in reject.what:  # the message has the remedy
        what, _, remedy = reject.what.rpartition("; ")
        raise DataError(what, remedy, path=reject.path, line=reject.line)
    if "question" not in columns:  # the command line has some columns, and the others are guessed
        remedy = "name the question too: data.columns.question='{COLUMN}\n\n{QUESTION}'"
        raise DataError(reject.what.removesuffix(f"; {ADD_COLUMN}"), remedy, path=reject.path, line=reject.line)
    word = shlex.quote(f"data.columns={json.dumps(columns, ensure_ascii=False)}")
    extra = columns["question"].rpartition("\n\n")[0]
    if extra:
        remedy = f"add {word} to the command to put it before the question; without {extra!r} in it, it is left out"
    else:
        remedy = f"add {word} to the command to leave it out"
    raise DataError(reject.what.removesuffix(f"; {ADD_COLUMN}"), remedy, path=reject.path, line=reject.line)


def _maps_rationale(columns: Any, overrides: Sequence[str]) -> bool:
    """Whether a map has a rationale. Ready-made maps split replies or have one."""
    named = any(word.removeprefix("--").startswith("data.columns") and "rationale" in word for word in overrides)
    return named or not isinstance(columns, dict) or not columns or bool({"rationale", "rationales"} & columns.keys())


def _text(
    path: Path, data: dict[str, Any], overrides: Sequence[str], explained: bool, unused: Sequence[str] = ()
) -> str:
    arms = {"arms": ["pst", "answer_only"]} if explained else {"arm": "answer_only"}
    tree: dict[str, Any] = {"output_dir": run_folder(path), **arms, "data": data}
    for word in overrides:
        set_key(tree, *parse_override(word))
    about_arms = (
        "# pst learns from the rationales too; answer_only is the baseline that shows whether they help."
        if explained
        else "# No rationales were found, so only answers can be trained. `pst teach` asks a teacher for rationales."
        + (f"\n# Columns of text that are not read: {', '.join(unused)}" if unused else "")
    )
    return "\n".join(
        [
            f"# pst run {shlex.quote(str(path))}",
            "# All keys: pst config --schema. Resumes when the same command is run again.",
            about_arms,
            "# The student is a small new model; a pretrained one needs one more line, for example",
            "# student: {model_name_or_path: google/flan-t5-base}",
            yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=1000),
        ]
    )
