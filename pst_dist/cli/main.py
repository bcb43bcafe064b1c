"""`pst <verb> config.yaml key.sub=value`: one command for every stage, on a laptop or inside a cluster job.

This module lists the verbs and turns their errors into one line and an exit code. Each verb is defined in `checks`,
`verbs`, `probe`, `submit` or `experiment`; to add one, define it there and list it here.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from pst_dist._version import __version__
from pst_dist.cli import checks, verbs
from pst_dist.cli.answer import answer
from pst_dist.cli.encoder import encoder
from pst_dist.cli.experiment import experiment
from pst_dist.cli.export import export
from pst_dist.cli.models import models
from pst_dist.cli.probe import probe
from pst_dist.cli.submit import submit
from pst_dist.cli.teach import teach
from pst_dist.cli.verb import COMMON_OPTIONS, Parser, Verb
from pst_dist.cli.watch import watch
from pst_dist.cli.words import gather_overrides
from pst_dist.errors import ConfigError, PstError
from pst_dist.text.redaction import RedactingFormatter, redact

_EPILOGUE = """\
A config is a YAML file, a run directory (its saved config), or the name of a ready-made one (`pst config --list`).
Any key can be overridden: `pst run my.yaml arm=post_thinking train.learning_rate=1e-3`. `+NAME` applies an overlay, a
ready-made set of keys: `+paper_t5` uses the published recipe, `+minilm` starts the student from the encoder's weights.

Stages of a run:     check -> preview -> run  (= shard, embed, train, evaluate, export, report)
First try:           pst demo

Your own rows:       pst check rows.jsonl;  pst run my.yaml
Use the student:     pst answer runs/demo/pst "question" --explain
                     pst answer runs/demo/pst --input questions.jsonl --output answers.jsonl
Serve the student:   transformers serve runs/demo/pst/export;  pst export runs/demo/pst --gguf

Exit codes: 0 done, 2 bad input or config, 3 damaged or stale files, 4 problem on this machine, 5 directory in use,
            6 training diverged, 7 rank lost, 75 stopped (run the same command again).
"""


_VERBS: tuple[Verb, ...] = (
    *(
        checks.check,
        teach,
        checks.preview,
        probe,
        encoder,
        verbs.shard,
        verbs.embed,
        checks.plan,
        checks.doctor,
        verbs.train,
        watch,
        submit,
    ),
    *(verbs.evaluate, export, answer, verbs.report, verbs.compare, verbs.run, verbs.demo, experiment),
    *(models, checks.verify, checks.config),
)
"""In the order of the help."""


def command_parser() -> Parser:
    """The parser of the whole command line; the docs are generated from it."""
    parser = Parser(
        prog="pst",
        description="Distil a large model's reasoning into a small one that answers first.",
        epilog=_EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pst_dist {__version__}")
    subparsers = parser.add_subparsers(metavar="verb", required=True)
    for verb in _VERBS:
        verb.add_to(subparsers)
    return parser


def _set_up_logging(arguments: argparse.Namespace) -> None:
    """Lines on standard error from rank zero; libraries print warnings and errors only."""
    first = os.environ.get("RANK", "0") == "0"
    level = logging.INFO if first and not arguments.quiet else logging.WARNING
    if arguments.verbose:
        level = logging.DEBUG
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pst_dist").setLevel(level)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if not first:  # the same warnings from every rank; `logs.quiet_libraries` chooses what rank zero shows
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _common_options_last(words: Sequence[str]) -> list[str]:
    """`words` with the options that every verb has moved behind the verb: `pst -q check x` is `pst check x -q`."""
    common = list(itertools.takewhile(lambda word: word in COMMON_OPTIONS, words))
    return [*words[len(common) :], *common] if len(common) < len(words) else list(words)


def run_verb(words: Sequence[str]) -> int:
    """Run one command line and return its exit code; a user's error becomes one line on standard error."""
    arguments, unknown = command_parser().parse_known_args(_common_options_last(words))
    _set_up_logging(arguments)
    try:
        if hasattr(arguments, "words"):  # argparse takes them only before the first option
            loose = [word for word in unknown if word == "-" or not word.startswith("-")]
            arguments.words += loose
            unknown = [word for word in unknown if word not in loose]
        extra = gather_overrides(unknown)
        if extra and not hasattr(arguments, "overrides"):
            raise ConfigError(f"unknown option --{extra[0]}", f"see `pst {arguments.run.name} --help`")
        if extra:
            arguments.overrides = [*arguments.overrides, *extra]
        return arguments.run(arguments)
    except PstError as error:
        if os.environ.get("PST_TRACEBACK"):
            print(redact(traceback.format_exc()), end="", file=sys.stderr)
        print(f"pst: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pst: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (ModuleNotFoundError, OSError) as error:
        from pst_dist.api.faults import as_our_error

        found = as_our_error(error)
        if found is None:
            raise
        print(f"pst: {found}", file=sys.stderr)
        return found.exit_code


def run_as_rank(words: Sequence[str]) -> NoReturn:
    """Run one command line and end this process, also where a launcher started it as a rank."""
    exit_code = run_verb(words)
    if "WORLD_SIZE" in os.environ:
        from pst_dist.distributed.ranks import leave

        leave(exit_code)
    sys.exit(exit_code)


def main() -> None:
    """Entry point of the `pst` command."""
    sys.exit(run_verb(sys.argv[1:]))


if __name__ == "__main__":
    main()
