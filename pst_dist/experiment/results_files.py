"""Writes an experiment's results: the Markdown page, its plots, and the numbers as JSON and CSV.

They go into the experiment's directory, and on request into a second one, such as a project's docs. No file is replaced
that an experiment did not write.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from pst_dist.experiment.outcomes import OUTCOMES, outcomes_text
from pst_dist.experiment.pictures import accuracy_picture, cost_picture, curve_picture, sweep_picture
from pst_dist.experiment.results import Results
from pst_dist.experiment.results_page import page_of
from pst_dist.storage.json_files import json_text
from pst_dist.storage.outputs import IsOurs, check_output, is_experiment_page, is_picture, write_output

RESOLVED_EXPERIMENT = "experiment.resolved.yaml"
_PICTURES = {
    "accuracy.png": accuracy_picture,
    "sweep.png": sweep_picture,
    "cost.png": cost_picture,
    "curves.png": curve_picture,
}
_PAGE_FILES = (*_PICTURES, "results.json", "results.csv", OUTCOMES)


def write_results(results: Results, command: Sequence[str], folders: Iterable[Path]) -> Path:
    """Write the page, its plots and its numbers (`results.json`, `results.csv`, `outcomes.jsonl`) into each folder.

    Returns the path of the first page. Raises InputError as `check_page_folder` does.
    """
    pages = []
    for folder in folders:
        anything = check_page_folder(folder)
        pictures = {name: draw(results) for name, draw in _PICTURES.items()}
        # The page is first, since it marks the other files as ours, should this process be killed here.
        page = page_of(results, command, [name for name, png in pictures.items() if png])
        write_output(folder / "README.md", page, is_experiment_page)
        for name, png in pictures.items():
            if png is None:
                (folder / name).unlink(missing_ok=True)
                continue
            write_output(folder / name, png, anything)
        write_output(folder / "results.json", json_text(results.to_json()), anything)
        write_output(folder / "results.csv", _csv(results), anything)
        write_output(folder / OUTCOMES, outcomes_text(results.outcomes), anything)
        pages.append(folder / "README.md")
    return pages[0]


def check_page_folder(folder: Path) -> IsOurs:
    """Raises InputError when the page or a file beside it would replace one that no experiment wrote.

    Returns what recognises the files beside the page: anything in a folder whose page is ours, else pictures of ours.
    """
    remedy = "name another folder"
    check_output(folder / "README.md", is_experiment_page, remedy=remedy)
    is_known = (folder / "README.md").is_file() or (folder / RESOLVED_EXPERIMENT).is_file()
    recognise: IsOurs = (lambda head: True) if is_known else is_picture
    for name in _PAGE_FILES:
        check_output(folder / name, recognise, remedy=remedy)
    return lambda head: True


def _csv(results: Results) -> str:
    """One line per finished seed."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["task", *results.experiment.vary, "variant", "arm", "seed", "rows", "split", "accuracy"])
    for group in results.groups:
        for seed, accuracy in zip(group.seeds, group.accuracies, strict=True):
            values = [value for _, value in group.point]
            line = [group.task, *values, group.variant, group.arm, seed, group.rows, group.split, f"{accuracy:.6f}"]
            writer.writerow(line)
    return stream.getvalue()
