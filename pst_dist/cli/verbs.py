"""What each verb of the command line does: reads its config, calls the stage, prints what came of it.

The work of a verb is imported when it runs. Which verbs there are, and what words they take, is `cli`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pst_dist.config.loading import dump_config, is_rows, load_config, overlays, ready_made_configs
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, InputError

if TYPE_CHECKING:
    from pst_dist.student.saved import LoadedStudent

_ON = {
    "embed": ("embed.backend",),
    "train": ("train.backend",),
    "run": ("embed.backend", "train.backend"),
    "demo": ("embed.backend", "train.backend"),
    "doctor": ("embed.backend", "train.backend"),
    "experiment": ("backend",),
}
"""What `on=ray` on the command line means for each verb. No key of a file: YAML takes a bare `on` for true."""


def say_where(verb: str, words: Sequence[str]) -> list[str]:
    """The words of a command line with `on=ray` or `on=local` spelt out; raises ConfigError for another place."""
    spelt: list[str] = []
    for word in words:
        if verb in _ON and word.startswith("on="):
            if word not in ("on=ray", "on=local"):
                raise ConfigError(f"{word}: there is no such place", "write on=ray or on=local")
            spelt += [f"{key}={word.removeprefix('on=')}" for key in _ON[verb]]
        else:
            spelt.append(word)
    return spelt


def _config_of(arguments: argparse.Namespace) -> Config:
    config = load_config(arguments.config, say_where(arguments.verb, arguments.overrides))
    if arguments.verb in ("shard", "embed", "train", "run", "demo"):
        from pst_dist.config.run_dir import check_lasting

        check_lasting(config)
    return config


def _arms_of(arguments: argparse.Namespace) -> list[Config]:
    from pst_dist.config.run_dir import expand_arms

    return expand_arms(_config_of(arguments))


def check(arguments: argparse.Namespace) -> int:
    from pst_dist.diagnostics.rows import check

    if is_rows(arguments.config):
        # Nothing is held out of a file that is only looked at.
        words = [f"data.train={arguments.config}", "data.validation_size=0", *arguments.overrides]
        config = load_config(None, words)
    else:
        config = _config_of(arguments)
    result = check(config, Path(arguments.rejects))
    for line in result.lines():
        print(line)
    return result.problem.exit_code if result.problem else 0


def preview(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from pst_dist.diagnostics.tokens import preview

    Console(highlight=False, soft_wrap=True).print(preview(_config_of(arguments), arguments.rows))
    return 0


def plan(arguments: argparse.Namespace) -> int:
    from pst_dist.diagnostics.cost import make_plan, split_words
    from pst_dist.diagnostics.cost_page import plan_lines

    overrides, machines = split_words(arguments.overrides)
    for config in [load_config(arguments.config, overrides)]:
        print("\n".join(plan_lines(make_plan(config, machines))))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from pst_dist.diagnostics.machine import examine

    words = [word for word in (arguments.config, *arguments.overrides) if word is not None]
    if arguments.compare or (len(words) > 1 and all(word.endswith(".json") for word in words)):
        if len(words) < 2:
            raise ConfigError("one report compares with nothing", "pst doctor a.json b.json")
        findings = examine.compare_reports([Path(word) for word in words])
    else:
        name = words.pop(0) if words and "=" not in words[0] else None
        overrides, request = examine.split_request(words)
        config = load_config(name, say_where("doctor", overrides)) if name or overrides else None
        machine, findings = examine.examine(config, request)
        if arguments.report:
            examine.write_report(machine, Path(arguments.report))
    for found in findings:
        if found.level != "ok" or not arguments.quiet:
            print(found.line())
    last, code = examine.verdict(findings)
    print(last)
    return code


def shard(arguments: argparse.Namespace) -> int:
    from pst_dist.config.run_dir import record_run, run_dir
    from pst_dist.pipeline import make_shards

    config = _config_of(arguments)
    manifest = make_shards(config, rebuild=arguments.rebuild)
    record_run(config)
    tars = [name for name in manifest.files if name.endswith(".tar")]
    print(f"{run_dir(config).shards}: {len(tars)} shard(s), digest {manifest.digest[:12]}")
    return 0


def embed(arguments: argparse.Namespace) -> int:
    from pst_dist.config.run_dir import run_dir
    from pst_dist.pipeline import make_embeddings

    config = _config_of(arguments)
    manifest = make_embeddings(config, rebuild=arguments.rebuild)
    print(f"{run_dir(config).embeddings}: {len(manifest.files)} file(s), digest {manifest.digest[:12]}")
    return 0


def train(arguments: argparse.Namespace) -> int:
    from pst_dist.config.run_dir import expand_arms, recorded
    from pst_dist.distributed.ranks import Ranks, process_group
    from pst_dist.pipeline import make_student

    ranks = Ranks.from_environment()
    is_main = ranks.is_main
    whole = _config_of(arguments)
    with contextlib.ExitStack() as stack:
        if len(whole.arms) > 1 and ranks.world_size > 1:
            # One group for all arms: ranks that meet again in a launcher's store read the addresses of the first time.
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
            chosen = "no validation rows: the last step is kept"
            if result.best_value is not None:
                chosen = f"best at step {result.best_step} ({result.metric} {result.best_value:.4f} on validation)"
            print(f"{config.output_dir}: {result.steps} steps in {result.seconds:.1f} s, {chosen}")
    return 0


def submit(arguments: argparse.Namespace) -> int:
    from pst_dist.cli.submit import submit

    return submit(arguments)


def evaluate(arguments: argparse.Namespace) -> int:
    from pst_dist.evaluation.evaluate import evaluate

    for config in _arms_of(arguments):
        print(_score_line(config, evaluate(config, rebuild=arguments.rebuild)))
    return 0


def _score_line(config: Config, results: dict[str, Any]) -> str:
    return (
        f"{config.output_dir}: accuracy {100 * results['accuracy']:.2f} % (standard error "
        f"{100 * results['accuracy_stderr']:.2f}) on {results['rows']} {results['split']} rows, "
        f"{results['tokens_to_answer']['mean']:.1f} tokens to the answer, {results['parse_failures']} unparsed"
    )


def export(arguments: argparse.Namespace) -> int:
    from pst_dist.publish.export import export

    for config in _arms_of(arguments):
        print(export(config, rebuild=arguments.rebuild))
        if arguments.lm_eval:
            from pst_dist.publish.lm_eval import lm_eval_command, write_lm_eval_task

            print(f"{write_lm_eval_task(config)}\n  {lm_eval_command(config)}")
    return 0


def answer(arguments: argparse.Namespace) -> int:
    from pst_dist.student.ask import answer_question
    from pst_dist.student.saved import load_student

    folder = _student_folder(Path(arguments.config))
    student = load_student(folder)
    think_below = _think_below(arguments.think_below, folder, student)
    questions = sys.stdin if arguments.question == "-" else [arguments.question]
    for question in questions:
        answer = answer_question(
            student, question.strip(), explain=arguments.explain, max_new_tokens=256, think_below=think_below
        )
        print(answer["answer"])
        if arguments.explain:
            silent = "wrote none" if student.format.writes_rationale else "was not taught to explain"
            silent = silent if answer["complete"] else "never ended its answer"
            print(f"because: {answer['rationale'] or f'(this student {silent})'}")
        logging.getLogger("pst_dist").info(
            "%d tokens, %.1f ms to the answer%s",
            answer["answer_tokens"],
            answer["milliseconds"],
            ", thought first" if think_below and answer["thought_first"] else "",
        )
    return 0


def _think_below(asked: float | None, folder: Path, student: LoadedStudent) -> float:
    """The threshold of an adaptive student: the one asked for, the exported one, or what the evaluation chose."""
    from pst_dist.evaluation.adaptive import chosen_threshold
    from pst_dist.evaluation.evaluate import evaluations_of

    if student.format.arm != "adaptive":
        if asked is not None:
            raise InputError(
                f"--think-below is for students of arm adaptive, this one is of {student.format.arm}", path=folder
            )
        return 0.0
    chosen = asked if asked is not None else student.format.think_below
    if chosen is None:
        chosen = chosen_threshold(evaluations_of(folder.parent, student.manifest))
    if chosen is None:
        logging.getLogger("pst_dist").warning(
            "when to think is not chosen yet: it answers at once (`pst evaluate` chooses, --think-below sets it)"
        )
    return chosen or 0.0


def _student_folder(path: Path) -> Path:
    """A run's best student, or the folder itself when it is one; names the arms of a directory of several."""
    if (path / "best").is_dir():
        return path / "best"
    arms = sorted(child.parent.name for child in path.glob("*/best"))
    if arms and not (path / "pst.json").is_file():
        raise InputError("this directory holds several arms", f"name one: {', '.join(arms)}", path=path)
    return path


def report(arguments: argparse.Namespace) -> int:
    from pst_dist.pipeline import compare_arms
    from pst_dist.publish.run_page import report

    config = _config_of(arguments)
    for arm in _arms_of(arguments):
        print(report(Path(arm.output_dir)))
    if config.arms:
        print(compare_arms(config))
    return 0


def compare(arguments: argparse.Namespace) -> int:
    from pst_dist.evaluation.compare import compare

    runs = [Path(run) for run in arguments.runs]
    if len(runs) == 1:
        runs = [Path(arm.output_dir) for arm in _arms_of(argparse.Namespace(config=str(runs[0]), overrides=[]))]
    print(compare(runs).table())
    if arguments.output:
        from pst_dist.publish.run_page import compare_report

        print(compare_report(runs, Path(arguments.output)))
    return 0


def run(arguments: argparse.Namespace) -> int:
    from pst_dist.config.run_dir import expand_arms
    from pst_dist.pipeline import run_all

    config = _config_of(arguments)
    pages = run_all(config, rebuild=arguments.rebuild)
    arms = [Path(arm.output_dir) for arm in expand_arms(config)]
    if len(arms) > 1:
        from pst_dist.evaluation.compare import compare

        print(compare(arms).table())
    else:
        from pst_dist.evaluation.records import read_results

        print(_score_line(config, read_results(arms[0] / "eval" / config.evaluate.split / "results.json")))
    print(f"report: {pages[-1]}")
    return 0


def demo(arguments: argparse.Namespace) -> int:
    arguments.config = "demo"
    code = run(arguments)
    config = _config_of(arguments)
    print(f"model:  {config.output_dir}/pst/export   (loads with plain transformers)")
    print(f'ask it: pst answer {config.output_dir}/pst "…" --explain')
    return code


def experiment(arguments: argparse.Namespace) -> int:
    from pst_dist.cli.experiment import experiment

    arguments.overrides = say_where("experiment", arguments.overrides)
    return experiment(arguments)


def verify(arguments: argparse.Namespace) -> int:
    from pst_dist.diagnostics.artefacts import verify
    from pst_dist.errors import IntegrityError
    from pst_dist.pipeline import repair

    root = Path(arguments.directory)
    findings = verify(root)
    if arguments.rebuild and any(finding.state != "intact" for finding in findings):
        repair(root, findings)
        findings = verify(root)
    for finding in findings:
        print(finding.line)
    problems = sum(finding.is_problem for finding in findings)
    print(f"{len(findings) - problems} intact, {problems} to fix")
    return IntegrityError.exit_code if problems else 0


def config(arguments: argparse.Namespace) -> int:
    if arguments.list:
        print("\n".join(ready_made_configs()))
        print("\noverlays, after any config: `pst run svamp +paper_t5`")
        print("\n".join(f"+{name:<11} {summary}" for name, summary in overlays().items()))
    elif arguments.schema:
        import json

        print(json.dumps(Config.model_json_schema(), indent=2))
    else:
        print(dump_config(_config_of(arguments)), end="")
    return 0
