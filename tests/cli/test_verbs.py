"""Every verb is one definition: it has an example that parses, its words may stand anywhere, and help stays cheap."""

from __future__ import annotations

import resource
import shlex
import statistics
import subprocess
import sys

import pytest
from evaluated import scored

from pst_dist.cli import main, verbs
from pst_dist.cli.main import run_verb
from pst_dist.config.loading import load_config

VERBS = {verb.name: verb for verb in main._VERBS}


@pytest.mark.parametrize("name", VERBS)
def test_the_help_of_every_verb_ends_with_an_example_that_its_parser_takes(name, capsys):
    with pytest.raises(SystemExit) as end:
        run_verb([name, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and f"example: {VERBS[name].example}\n" in printed
    program, *words = shlex.split(VERBS[name].example)
    arguments, unknown = main.command_parser().parse_known_args(words)
    assert program == "pst" and unknown == [] and arguments.run is VERBS[name]


def test_only_what_is_required_is_named_as_missing(capsys):
    with pytest.raises(SystemExit):
        run_verb(["run"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("the following arguments are required: config")
    arguments = main.command_parser().parse_args(["run", "demo"])
    assert arguments.overrides == []


def test_the_list_of_verbs_holds_each_once_with_its_line_of_help(capsys):
    with pytest.raises(SystemExit):
        run_verb(["--help"])
    printed = capsys.readouterr().out
    assert len(VERBS) == len(main._VERBS) == 23
    for verb in main._VERBS:
        assert f" {verb.name} {verb.help}" in " ".join(printed.split())


@pytest.mark.parametrize(
    "words",
    [
        ["seed=7", "+warm", "arm=prefix", "--rebuild", "-q"],
        ["--rebuild", "seed=7", "-q", "+warm", "arm=prefix"],
        ["-q", "--seed=7", "+warm", "--rebuild", "--arm", "prefix"],
        ["+warm", "--rebuild", "--arm=prefix", "-q", "seed=7"],
    ],
    ids=["before", "between", "as options", "mixed"],
)
def test_overrides_and_overlays_may_stand_anywhere_among_the_options(monkeypatch, words):
    seen = []
    monkeypatch.setattr(verbs.shard, "function", lambda arguments: seen.append(arguments) or 0)
    assert run_verb(["shard", "demo", *words]) == 0
    arguments = seen[-1]
    assert (arguments.config, arguments.rebuild, arguments.quiet) == ("demo", True, True)
    assert sorted(arguments.overrides) == ["+warm", "arm=prefix", "seed=7"]


@pytest.mark.parametrize("first", [["-q"], ["-v", "--quiet"], ["--verbose", "-q"]])
def test_options_of_every_verb_may_precede_the_verb(monkeypatch, first):
    seen = []
    monkeypatch.setattr(verbs.shard, "function", lambda arguments: seen.append(arguments) or 0)
    assert run_verb([*first, "shard", "demo", "seed=7"]) == 0
    assert (seen[-1].quiet, seen[-1].verbose, seen[-1].config) == (True, len(first) == 2, "demo")
    assert seen[-1].overrides == ["seed=7"]


def test_one_run_of_several_arms_is_compared_by_its_name_alone(tmp_path, capsys):
    from pst_dist.config.loading import dump_config
    from pst_dist.storage.atomic import write_text

    config = load_config("demo", [f"output_dir={tmp_path}", "arms=[pst,answer_only]"])
    write_text(tmp_path / "config.resolved.yaml", dump_config(config))
    for arm in ("pst", "answer_only"):
        scored(tmp_path / arm, arm, "1110" if arm == "pst" else "1000")
    assert run_verb(["compare", str(tmp_path)]) == 0
    assert "75.00" in capsys.readouterr().out


def test_help_costs_less_than_three_tenths_of_a_second_of_a_processor():
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, "-m", "pst_dist.cli", "--help"], check=True, capture_output=True)
        spent.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert statistics.median(spent) < 0.3


def test_help_of_the_program_reads_no_config_schema():
    script = (
        "import sys, pst_dist.cli.main as main\n"
        "try: main.run_verb(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(str({'pydantic', 'yaml', 'numpy', 'rich'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("submit slurm demo node=2", "unknown key 'node'; did you mean 'nodes'?"),
        ("submit slurm demo tmie=01:00:00", "unknown key 'tmie'; did you mean 'time'?"),
        ("submit slurm demo lr=1e-3 --dry-run", "unknown key 'lr'; did you mean 'train.learning_rate'?"),
        ("submit ray demo adress=http://localhost:8265", "unknown key 'adress'; did you mean 'address'?"),
        ("experiment letters job=2 --dry-run", "unknown key 'job'; did you mean 'jobs'?"),
        ("experiment letters seed=1 --dry-run", "an experiment sets this for each run; write seeds=[1]"),
    ],
)
def test_a_misspelt_argument_of_a_verb_is_compared_with_the_verbs_own(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_verb(words.split()) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
