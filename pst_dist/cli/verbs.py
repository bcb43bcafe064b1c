"""The verbs that carry out a run, stage by stage or as a whole, and those that use a finished run.

Each reads its config, calls the stage, and prints the result.

Each verb imports what it needs when it runs, so that `pst --help` stays fast.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_dist.cli.verb import CONFIG, OVERRIDES, REBUILD, Option, verb
from pst_dist.cli.words import config_of, finished_config_of, lasting_config_of

if TYPE_CHECKING:
    from pst_dist.config.schema import Config


def _arms_of(config: Config) -> list[Config]:
    from pst_dist.config.run_dir import expand_arms

    return expand_arms(config)


@verb(
    "pack the rows into webdataset shards",
    "pst shard my.yaml --to messages",
    CONFIG,
    OVERRIDES,
    REBUILD,
    Option(
        "--to",
        choices=("messages", "parquet"),
        help="also write the rows in a format for other programs: chat messages with the answer first in the "
        "assistant's turn (TRL, axolotl, LLaMA-Factory, ms-swift), or Parquet with every field",
    ),
)
def shard(arguments: argparse.Namespace) -> int:
    from pst_dist.config.run_dir import record_run, run_dir
    from pst_dist.pipeline import make_shards

    config = lasting_config_of(arguments)
    manifest = make_shards(config, rebuild=arguments.rebuild)
    record_run(config)
    tars = [name for name in manifest.files if name.endswith(".tar")]
    print(f"{run_dir(config).shards}: {len(tars)} shard(s), digest {manifest.digest[:12]}")
    if arguments.to:
        from pst_dist.data.interchange import write_interchange
        from pst_dist.data.shards import ShardSet

        folder = write_interchange(ShardSet.open(run_dir(config).shards), arguments.to)
        print("\n".join(str(file) for file in sorted(folder.iterdir()) if file.name != "manifest.json"))
    return 0


@verb(
    "compute embeddings of the teacher's rationales",
    "pst embed my.yaml embed.backend=ray",
    CONFIG,
    OVERRIDES,
    REBUILD,
    on=("embed.backend",),
)
def embed(arguments: argparse.Namespace) -> int:
    from pst_dist.config.run_dir import run_dir
    from pst_dist.pipeline import make_embeddings

    config = lasting_config_of(arguments)
    manifest = make_embeddings(config, rebuild=arguments.rebuild)
    print(f"{run_dir(config).embeddings}: {len(manifest.files)} file(s), digest {manifest.digest[:12]}")
    return 0


@verb(
    "train the student; resumes automatically",
    "pst train my.yaml train.deepspeed=zero2",
    CONFIG,
    OVERRIDES,
    REBUILD,
    # The deepspeed launcher adds it; the rank comes from LOCAL_RANK.
    Option("--local_rank", type=int, help=argparse.SUPPRESS),
    on=("train.backend",),
)
def train(arguments: argparse.Namespace) -> int:
    from pst_dist.config.run_dir import expand_arms, recorded
    from pst_dist.distributed.ranks import Ranks, process_group
    from pst_dist.pipeline import make_student

    ranks = Ranks.from_environment()
    is_main = ranks.is_main
    whole = lasting_config_of(arguments)
    with contextlib.ExitStack() as stack:
        if len(whole.arms) > 1 and ranks.world_size > 1:
            # One group for all arms: a second rendezvous in a launcher's store would read the addresses of the first.
            with_deepspeed = whole.train.deepspeed is not None
            patience = whole.train.timeout_seconds
            stack.enter_context(process_group(ranks, with_deepspeed=with_deepspeed, timeout_seconds=patience))
        if is_main and whole.arms:
            stack.enter_context(recorded(whole))
        for config in expand_arms(whole):
            with recorded(config) if is_main else contextlib.nullcontext():
                result = make_student(config, rebuild=arguments.rebuild)
            if not is_main:
                continue
            chosen = "no validation rows, so the last step is kept"
            if result.best_value is not None:
                chosen = f"best at step {result.best_step} ({result.metric} {result.best_value:.4f} on validation)"
            print(f"{config.output_dir}: {result.steps} steps in {result.seconds:.1f} s, {chosen}")
    return 0


def _evaluate_help() -> str:
    return (
        "On every GPU of a machine:  deepspeed --num_gpus 8 --module pst_dist evaluate RUN\n"
        "                            torchrun --standalone --nproc_per_node 8 -m pst_dist evaluate RUN\n"
        "On a Ray cluster:           pst evaluate RUN on=ray evaluate.ray.num_actors=8\n"
        "The results are the same as with one process. The same command resumes an evaluation that was killed;\n"
        "--rebuild starts it again from the beginning.\n\n"
        "To score other rows than the run's own: pst evaluate RUN data.test=other.jsonl [task=svamp]\n"
        "[data.answer_type=number] [data.columns=...]. The scores go to RUN/eval/NAME-DIGEST; pass such folders to\n"
        "`pst compare` to compare them."
    )


@verb(
    "generate answers for the test rows, or any other rows, and score them",
    "pst evaluate runs/demo/pst",
    CONFIG,
    OVERRIDES,
    REBUILD,
    # The deepspeed launcher adds it; the rank comes from LOCAL_RANK.
    Option("--local_rank", type=int, help=argparse.SUPPRESS),
    more=_evaluate_help,
    on=("evaluate.backend",),
)
def evaluate(arguments: argparse.Namespace) -> int:
    from pst_dist.config.effect import given_keys, names_other_rows
    from pst_dist.distributed.ranks import Ranks, process_group
    from pst_dist.pipeline import make_scores

    whole = finished_config_of(arguments, "evaluate")
    others = names_other_rows(whole, given_keys(arguments.overrides))
    ranks = Ranks.from_environment() if whole.evaluate.backend == "local" else Ranks()
    with process_group(ranks, with_deepspeed=False, timeout_seconds=whole.train.timeout_seconds):
        for config in _arms_of(whole):
            results = make_scores(config, rebuild=arguments.rebuild, other_rows=others)
            if results is not None:
                print(_score_line(config, results))
    return 0


def _score_line(config: Config, results: dict[str, Any]) -> str:
    source, folder = results.get("source"), config.output_dir
    if source:
        folder = str(Path(folder) / "eval" / results["split"])
    known = f", {source['in_training']} questions also in the training rows" if source and source["in_training"] else ""
    return (
        f"{folder}: accuracy {100 * results['accuracy']:.2f} % (standard error "
        f"{100 * results['accuracy_stderr']:.2f}) on {results['rows']} {'other' if source else results['split']} rows, "
        f"{results['tokens_to_answer']['mean']:.1f} tokens to the answer, {results['unparsed']} unparsed{known}"
        + "".join(
            f"\n  {name}: {100 * part['accuracy']:.2f} % ({100 * part['accuracy_stderr']:.2f}) on {part['rows']} rows"
            for name, part in (results.get("sources") or {}).items()
        )
    )


@verb("write the plots and the report of a run", "pst report runs/demo/pst", CONFIG, OVERRIDES)
def report(arguments: argparse.Namespace) -> int:
    from pst_dist.config.effect import given_keys, refuse_without_effect
    from pst_dist.pipeline import compare_arms
    from pst_dist.publish.run_page import report

    config = config_of(arguments)
    for arm in _arms_of(config):
        refuse_without_effect("report", arm, given_keys(arguments.overrides))
        print(report(Path(arm.output_dir)))
    if config.arms:
        print(compare_arms(config))
    return 0


@verb(
    "compare finished runs side by side",
    "pst compare runs/demo/pst runs/demo/answer_only",
    Option(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run directories that were scored on the same rows, or score folders RUN/eval/NAME-DIGEST",
    ),
    Option("-o", "--output", metavar="PAGE.html", help="also write an HTML page"),
)
def compare(arguments: argparse.Namespace) -> int:
    runs = [Path(run) for run in arguments.runs]
    if len(runs) == 1 and runs[0].absolute().parent.name != "eval":
        alone = argparse.Namespace(config=str(runs[0]), overrides=[], on=())
        runs = [Path(arm.output_dir) for arm in _arms_of(config_of(alone))]
    _print_comparison(runs)
    if arguments.output:
        from pst_dist.publish.run_page import compare_report

        print(compare_report(runs, Path(arguments.output)))
    return 0


def _dry_run(arguments: argparse.Namespace) -> int:
    from pst_dist.diagnostics.dry_run import dry_run

    found = dry_run(config_of(arguments))
    for finding in found.findings:
        if finding.level != "ok" or not arguments.quiet:
            print(finding.line())
    problems = sum(finding.level == "problem" for finding in found.findings)
    print("the run can start" if not problems else f"{problems} problem(s): the run would fail")
    return found.exit_code


def _print_comparison(runs: list[Path]) -> None:
    from pst_dist.evaluation.compare import compare
    from pst_dist.evaluation.verdict import verdict

    comparison = compare(runs)
    print(comparison.table())
    print("", *verdict(comparison), sep="\n")


@verb(
    "run all stages, skipping completed ones",
    "pst run my.yaml arms=[pst,answer_only]",
    CONFIG,
    OVERRIDES,
    REBUILD,
    Option("--dry-run", action="store_true", help="only run the checks that are possible before the first stage"),
    on=("embed.backend", "train.backend", "evaluate.backend"),
)
def run(arguments: argparse.Namespace) -> int:
    from pst_dist.config.run_dir import expand_arms
    from pst_dist.pipeline import run_all

    if getattr(arguments, "dry_run", False):
        return _dry_run(arguments)
    config = lasting_config_of(arguments)
    pages = run_all(config, rebuild=arguments.rebuild)
    arms = [Path(arm.output_dir) for arm in expand_arms(config)]
    if len(arms) > 1:
        _print_comparison(arms)
    else:
        from pst_dist.config.run_dir import run_dir
        from pst_dist.evaluation.evaluate import RESULTS
        from pst_dist.evaluation.records import read_results

        (only,) = expand_arms(config)
        results = read_results(run_dir(only).evaluation(config.evaluate.split) / RESULTS)
        print(_score_line(config, results))
    print(f"report: {pages[-1]}")
    return 0


@verb(
    "run all stages on a built-in task; needs no data",
    "pst demo",
    OVERRIDES,
    REBUILD,
    on=("embed.backend", "train.backend", "evaluate.backend"),
)
def demo(arguments: argparse.Namespace) -> int:
    arguments.config = "demo"
    code = run(arguments)
    config = lasting_config_of(arguments)
    print(f"model:  {config.output_dir}/pst/export   (loads with plain transformers)")
    print(f'ask it: pst answer {config.output_dir}/pst "…" --explain')
    return code
