"""`pst <verb> config.yaml key.sub=value`: one command for every stage, on a laptop or inside a cluster job.

The verbs, their words and what becomes of their errors; what they do is `verbs`. A verb's work is imported when it
runs, so `pst --help` needs neither torch nor a second.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from pst_dist._version import __version__
from pst_dist.cli import verbs
from pst_dist.errors import ConfigError, PstError

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
        "check": (verbs.check, "read the rows and say what is wrong with them", "pst check rows.jsonl"),
        "preview": (
            verbs.preview,
            "show the tokens of some rows and the loss each one carries",
            "pst preview my.yaml -n 2",
        ),
        "shard": (verbs.shard, "pack the rows into webdataset shards", "pst shard my.yaml"),
        "embed": (verbs.embed, "encode the teacher's rationales", "pst embed my.yaml embed.backend=ray"),
        "plan": (verbs.plan, "what a run will cost: memory, checkpoints, time", "pst plan my.yaml nodes=4 gpus=8"),
        "doctor": (
            verbs.doctor,
            "what on this machine would stop a run, and the remedy",
            "pst doctor my.yaml nodes=2 gpus=8",
        ),
        "train": (verbs.train, "train the student; resumes by itself", "pst train my.yaml train.deepspeed=zero2"),
        "submit": (verbs.submit, "hand a run to a cluster and follow it", "pst submit slurm my.yaml nodes=2 gpus=8"),
        "evaluate": (verbs.evaluate, "decode and score the test rows", "pst evaluate runs/demo/pst"),
        "export": (verbs.export, "write the student as a plain Hugging Face model", "pst export runs/demo/pst"),
        "answer": (verbs.answer, "ask a trained student", 'pst answer runs/demo/pst "question" --explain'),
        "report": (verbs.report, "draw the plots and the page of a run", "pst report runs/demo/pst"),
        "compare": (verbs.compare, "put finished runs side by side", "pst compare runs/demo/pst runs/demo/answer_only"),
        "run": (verbs.run, "all stages, skipping those already complete", "pst run my.yaml arms=[pst,answer_only]"),
        "demo": (verbs.demo, "all stages on an embedded task, no data needed", "pst demo"),
        "experiment": (
            verbs.experiment,
            "tasks x variants x seeds on identical rows, and a page of results",
            "pst experiment letters seeds=[0] jobs=2",
        ),
        "verify": (verbs.verify, "compare every file of a run with its digest", "pst verify runs/demo"),
        "config": (verbs.config, "print the resolved config, its schema, or the ready-made ones", "pst config my.yaml"),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pst",
        description="Distil a large model's reasoning into a small one that answers first.",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pst_dist {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    for name, (_, text, example) in _verbs().items():
        verb = subparsers.add_parser(
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
        verb.add_argument(
            "--think-below",
            type=float,
            metavar="P",
            help="an adaptive student thinks first where its answer has a probability under this (0 never, 2 always); "
            "the default is what `pst evaluate` chose",
        )
    elif name == "compare":
        verb.add_argument("runs", nargs="+", metavar="RUN", help="run directories scored on the same rows")
        verb.add_argument("-o", "--output", metavar="PAGE.html", help="also write an HTML page")
    elif name == "experiment":
        from pst_dist.cli.experiment import add_arguments

        add_arguments(verb, overrides)
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
        from pst_dist.cli.submit import CLUSTERS, JOB_WORDS

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
        from pst_dist.diagnostics.cost import Machines

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
    except KeyboardInterrupt:
        print("pst: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (ModuleNotFoundError, OSError) as error:
        from pst_dist.api import as_our_error

        found = as_our_error(error)
        if found is None:
            raise
        print(f"pst: {found}", file=sys.stderr)
        return found.exit_code


def main() -> None:
    """Entry point of the `pst` command."""
    sys.exit(run_verb(sys.argv[1:]))


if __name__ == "__main__":
    main()
