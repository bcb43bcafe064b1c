"""The verbs that do not change a run: check, preview, plan, doctor, verify, config.

Each verb imports what it needs when it runs, so that `pst --help` stays fast.
"""

from __future__ import annotations

import argparse
import json
import shlex
import textwrap
from pathlib import Path

from pst_dist.cli.verb import CONFIG, MAYBE_CONFIG, OVERRIDES, Option, overrides, positive_whole, verb
from pst_dist.cli.words import config_of, config_of_rows, rows_and_words, spell_on
from pst_dist.errors import ConfigError


@verb(
    "read the rows and report problems in them",
    "pst check rows.jsonl",
    Option(
        "config",
        help="the rows themselves (a file, a URL, hf:… or gen:…), or a config file, run directory or ready-made config",
    ),
    OVERRIDES,
    Option("--rejects", metavar="FILE", default="rejects.jsonl", help="where to list bad rows (default %(default)s)"),
    Option("--write", metavar="FILE", help="write a config for these rows, with the proposed columns: --write my.yaml"),
)
def check(arguments: argparse.Namespace) -> int:
    from pst_dist.config.locate import is_rows
    from pst_dist.diagnostics.rows import check
    from pst_dist.diagnostics.starter import check_target, run_folder, write_starter

    target = Path(arguments.write) if arguments.write else None
    files, rest = rows_and_words(arguments.config, arguments.overrides) if is_rows(arguments.config) else ([], [])
    if target is not None:
        check_target(target, files)
    if files:
        # With the directory of the config that is written, so that remote rows are fetched once.
        folder = [f"output_dir={run_folder(target)}"] if target is not None else []
        config = config_of_rows(files, [*folder, *rest])
    else:
        config = config_of(arguments)
    result = check(config, Path(arguments.rejects))
    if target is not None:
        result = write_starter(target, files, rest, result, Path(arguments.rejects))
        print(f"wrote {target}; with it:")
    for line in result.lines():
        print(line)
    if target is not None and result.ok:
        print(f"next: pst run {shlex.quote(str(target))}")
    return result.problem.exit_code if result.problem else 0


@verb(
    "show the tokens of some rows and the loss that applies to each token",
    "pst preview my.yaml -n 2",
    CONFIG,
    OVERRIDES,
    Option("-n", "--rows", type=positive_whole, default=2, help="training rows to show (default %(default)s)"),
)
def preview(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from pst_dist.diagnostics.tokens import preview

    Console(highlight=False, soft_wrap=True).print(preview(config_of(arguments), arguments.rows))
    return 0


def _machine_words() -> str:
    from pst_dist.diagnostics.cost import Machines

    fields = Machines.model_fields.items()
    lines = []
    for field, info in fields:
        default = "" if info.default is None else f" (default {info.default:g})"
        text = f"{field}{default}: {info.description}"
        lines.append(textwrap.fill(" ".join(text.split()), 110, initial_indent="  ", subsequent_indent="      "))
    return "machines:\n" + "\n".join(lines)


@verb(
    "estimate what a run will cost: memory, checkpoints, time",
    "pst plan my.yaml --measure",
    CONFIG,
    OVERRIDES,
    Option(
        "--measure", action="store_true", help="also estimate the time, by measuring for half a minute on this machine"
    ),
    more=_machine_words,
)
def plan(arguments: argparse.Namespace) -> int:
    from pst_dist.config.loading import load_config
    from pst_dist.config.run_dir import expand_arms
    from pst_dist.diagnostics.cost import make_plan, split_words
    from pst_dist.diagnostics.cost_page import arm_lines, plan_lines
    from pst_dist.diagnostics.counted_rows import rows_once

    words, machines = split_words(arguments.overrides)
    config, *others = expand_arms(load_config(arguments.config, words))
    measured = None
    if arguments.measure:
        from pst_dist.diagnostics.measure import measure

        measured = measure(config, machines)
        machines = measured.applied(machines)
    read = rows_once(config)
    tokens_per_row = measured.tokens_per_row if measured is not None else None
    plan = make_plan(config, machines, tokens_per_row=tokens_per_row, read=read)
    lines = plan_lines(plan)
    if measured is not None:
        lines[lines.index("") + 1 : lines.index("") + 1] = measured.lines(config, plan.steps, plan.ranks)
    lines += arm_lines([plan, *(make_plan(other, machines, read=read) for other in others)])
    print("\n".join(lines))
    return 0


@verb(
    "find problems on this machine that would stop a run, with remedies",
    "pst doctor my.yaml nodes=2 gpus=8",
    Option("config", nargs="?", help="config file, run directory, ready-made name, or a first report"),
    overrides(
        "keys of the config, nodes=N, gpus=N (per node), hostfile=PATH; or more reports to compare",
        "word",
    ),
    Option("--report", metavar="FILE.json", help="also write facts about this node to a file, to compare nodes"),
    Option("--compare", action="store_true", help="compare the nodes of several reports"),
    on=("embed.backend", "train.backend", "evaluate.backend"),
)
def doctor(arguments: argparse.Namespace) -> int:
    from pst_dist.config.loading import load_config
    from pst_dist.diagnostics.machine import examine

    words = [word for word in (arguments.config, *arguments.overrides) if word is not None]
    if arguments.compare or (len(words) > 1 and all(word.endswith(".json") for word in words)):
        if len(words) < 2:
            raise ConfigError("a comparison needs at least two reports", "pst doctor a.json b.json")
        findings = examine.compare_reports([Path(word) for word in words])
    else:
        name = words.pop(0) if words and "=" not in words[0] else None
        keys, request = examine.split_request(words)
        config = load_config(name, spell_on(keys, arguments.on)) if name or keys else None
        if arguments.report:
            examine.check_report(Path(arguments.report))  # before the minute of looking
        machine, findings = examine.examine(config, request)
        if arguments.report:
            examine.write_report(machine, Path(arguments.report))
    for found in findings:
        if found.level != "ok" or not arguments.quiet:
            print(found.line())
    last, code = examine.verdict(findings)
    print(last)
    return code


@verb(
    "check every file of a run against its digest",
    "pst verify runs/demo",
    Option("directory", metavar="DIR", help="a run, data or model directory, or a directory with several runs"),
    Option("--rebuild", action="store_true", help="remove damaged files, and recreate them if possible"),
)
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


@verb(
    "print the resolved config, the schema, or the ready-made configs",
    "pst config my.yaml",
    MAYBE_CONFIG,
    OVERRIDES,
    Option("--schema", action="store_true", help="print the JSON schema of all keys, with descriptions"),
    Option("--list", action="store_true", help="list the ready-made configs, the overlays and the arms"),
)
def config(arguments: argparse.Namespace) -> int:
    from pst_dist.config.loading import dump_config
    from pst_dist.config.locate import overlays, ready_made_configs
    from pst_dist.config.schema import Config

    if arguments.list:
        from pst_dist.arms import ARMS

        print("\n".join(ready_made_configs()))
        print("\noverlays, after any config: `pst run svamp +paper_t5`")
        print("\n".join(f"+{name:<11} {summary}" for name, summary in overlays().items()))
        print("\narms: `pst run svamp arm=pst`, `pst run svamp arms=[pst,answer_only]`")
        print("\n".join(f"{arm.name:<14} {arm.description}" for arm in ARMS.values()))
    elif arguments.schema:
        print(json.dumps(Config.model_json_schema(), indent=2))
    else:
        print(dump_config(config_of(arguments)), end="")
    return 0
