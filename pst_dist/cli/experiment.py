"""`pst experiment`: its arguments and its output."""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

from pst_dist.cli.verb import Option, overrides, verb
from pst_dist.cli.words import spell_on
from pst_dist.errors import ConfigError

EXPERIMENT_WORDS = """\
An experiment lists tasks, variants (arms, possibly with changed keys), seeds and, for a sweep, values of keys:

  name: mine
  tasks:    {svamp: {config: svamp, data.root: FOLDER}}
  variants: {answer_only: {arm: answer_only}, pst: {arm: pst}, raw: {arm: pst, loss.centre: false}}
  vary:     {data.max_rows: [100, 400]}
  seeds:    [0, 1, 2]

A task may restrict itself to some of them: `variants: [pst]`, `seeds: [0]`.
Each combination has its own run directory in runs/experiments/NAME. Finished runs are kept, interrupted runs resume,
and a finished run is never replaced by one with other settings. Arguments:
  seeds=[0]  jobs=2  keep=results   keys of the experiment    train.max_steps=50   a key of every run
  on=ray                            runs are tasks of a Ray cluster (ray.address=, ray.num_gpus_per_run=)

Machines without a shared disk can split the seeds: seeds=[0] on one, seeds=[1] on another. To combine the results,
copy the other machine's runs/experiments/NAME, or just its outcomes.jsonl, to FOLDER:
  pst experiment mine.yaml seeds=[0,1] --with FOLDER"""


@verb(
    "run every task x variant x seed on identical rows, and write a results page",
    "pst experiment letters seeds=[0] jobs=2",
    Option("config", nargs="?", help="experiment file, or the name of a ready-made one (--list)"),
    overrides("keys of the experiment, or config keys of all its runs"),
    Option("--list", action="store_true", help="list the ready-made experiments and the questions they answer"),
    Option(
        "--dry-run",
        action="store_true",
        help="list the runs, finished or not, and check the others without training",
    ),
    Option("--collect", action="store_true", help="do not train; only write the results of finished runs"),
    Option("--page", metavar="FOLDER", help="also write the page and its plots to this folder"),
    Option(
        "--with",
        dest="beside",
        action="append",
        default=[],
        metavar="FOLDER",
        help="reuse finished runs of another machine or an earlier call from this folder (may be repeated)",
    ),
    on=("backend",),
    more=lambda: EXPERIMENT_WORDS,
)
def experiment(arguments: argparse.Namespace) -> int:
    """Run, list or collect an experiment; the exit code is that of the first failed run."""
    from pst_dist.experiment import load_experiment, ready_made_experiments

    if arguments.list:
        for name in ready_made_experiments():
            print(f"{name}\n{textwrap.indent(textwrap.fill(load_experiment(name).question, 100), '    ')}")
        return 0
    if arguments.config is None:
        raise ConfigError("no experiment given", "`pst experiment --list` lists the ready-made ones")
    from pst_dist.experiment.checks import check_runs
    from pst_dist.experiment.driver import run_experiment
    from pst_dist.experiment.outcomes import outcomes_elsewhere
    from pst_dist.experiment.results_table import table_lines
    from pst_dist.experiment.runs import refuse_other_results, unfinished
    from pst_dist.experiment.spec import runs_of

    words = spell_on(arguments.overrides, arguments.on)
    wanted = load_experiment(arguments.config, words)
    beside = [Path(folder) for folder in arguments.beside]
    if arguments.dry_run:
        runs = runs_of(wanted)
        todo = unfinished(runs, outcomes_elsewhere(runs, beside))
        names = {run.name for run in todo}
        for run in runs:
            print(f"{'to do' if run.name in names else 'finished':8}  {run.name}  {run.config.output_dir}")
        check_runs(todo, here=wanted.backend == "local")
        refuse_other_results(todo)
        return 0
    command = ["pst", "experiment", arguments.config, *words]
    page = Path(arguments.page) if arguments.page else None
    results, error = run_experiment(wanted, command, page=page, only_collect=arguments.collect, beside=beside)
    print("\n".join(table_lines(results)))
    if results.missing:
        print(f"{len(results.missing)} runs are not finished and not in the table")
    print(f"page: {wanted.path / 'README.md'}")
    if error is not None:
        print(f"pst: {error}", file=sys.stderr)
        return error.exit_code
    return 0
