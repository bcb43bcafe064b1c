"""The documentation: generated pages are current, every command on a page is one that `pst` accepts, links work."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pst_dist.cli.main import command_parser
from pst_dist.cli.words import gather_overrides
from pst_dist.config.loading import load_config
from pst_dist.config.locate import overlays, ready_made_configs

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(path for path in DOCS.glob("*.md") if path.name != "commands.md"),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "cluster/README.md", "ds_configs/README.md")),
    DOCS / "results" / "README.md",
]
_OF_SUBMIT = {"address", "nodes", "gpus", "time", "partition", "account", "parallel", "ranks", "cpus", "seeds", "arms"}
"""Words that `pst submit`, `plan` and `doctor` take beside the keys of a config."""


def module_of(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["configuration.md", "commands.md"])
def test_a_generated_page_is_what_the_code_says_today(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    made = module_of("generate").PAGES[name]()
    if sys.version_info[:2] == (3, 11) or name != "commands.md":  # argparse words its help differently elsewhere
        assert (DOCS / name).read_text(encoding="utf-8") == made, "run `python docs/generate.py`"
    assert len(made) > 5_000


def in_blocks() -> Iterator[tuple[str, str]]:
    """(page, command) for every `pst` command in a code block."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ {4}(?:.*-- )?(pst [a-z].*)$", text, re.MULTILINE):
            for command in re.split(r"\s*;\s+", re.sub(r"\s{2,}#.*|\s#\s.*", "", line)):
                yield page.relative_to(ROOT).as_posix(), command


def in_sentences() -> Iterator[tuple[str, str]]:
    """(page, command) for every `pst` command in a sentence or table; it may leave out its arguments."""
    for page in PAGES:
        for command in re.findall(r"`(pst [a-z][^`]*)`", page.read_text(encoding="utf-8")):
            yield page.relative_to(ROOT).as_posix(), command


@pytest.mark.parametrize(("page", "command"), sorted(set(in_blocks())))
def test_a_command_in_a_code_block_is_accepted(page, command):
    words = [word for word in shlex.split(command)[1:] if word not in ("…", "...")]
    try:
        arguments, unknown = command_parser().parse_known_args(words)
    except SystemExit as ended:
        assert ended.code == 0, f"{page}: {command}"  # --help
        return
    gather_overrides(unknown)
    for word in getattr(arguments, "overrides", []):
        if word.startswith("+"):
            assert word[1:] in overlays() or word == "+NAME", f"{page}: no overlay {word}"
        elif (key := word.partition("=")[0]) and not _is_launcher_word(words[0], key):
            assert _is_key(key), f"{page}: no setting {key!r} in {command!r}"


@pytest.mark.parametrize(("page", "command"), sorted(set(in_sentences())))
def test_a_command_in_a_sentence_names_a_verb_and_its_options(page, command):
    verbs = command_parser()._subparsers._group_actions[0].choices
    _, verb, *words = command.split()
    assert verb in verbs or verb.isupper(), f"{page}: no verb {verb!r}"
    for word in words:
        if word.startswith("--") and verb in verbs:
            assert word.partition("=")[0] in verbs[verb].format_help(), f"{page}: no option {word} of `pst {verb}`"


def _is_launcher_word(verb: str, key: str) -> bool:
    launching = verb in ("submit", "plan", "doctor") and (key in _OF_SUBMIT or key.split(".")[0] in ("env", "sbatch"))
    return launching or key in ("on", "key.sub", "hostfile") or (verb == "experiment" and key in ("jobs", "seeds"))


def _is_key(key: str) -> bool:
    section = load_config(None)
    for part in key.split("."):
        if not hasattr(section, part):
            return False
        section = getattr(section, part)
    return True


def test_the_pages_name_every_ready_made_config_and_overlay():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in ready_made_configs()) and all(
        f"`+{name}`" in text for name in overlays()
    )


def test_the_site_is_built_without_a_broken_link(tmp_path):
    pytest.importorskip("zensical", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    build = module_of("build")
    build.gather(tmp_path / "docs")
    shutil.copyfile(ROOT / "mkdocs.yml", tmp_path / "mkdocs.yml")
    (tmp_path / "pst_dist").symlink_to(ROOT / "pst_dist")
    (tmp_path / "build").mkdir()
    (tmp_path / "docs").rename(tmp_path / "build" / "docs")
    done = zensical(tmp_path)
    assert done.returncode == 0 and "No issues found" in done.stderr, done.stdout[-3000:] + done.stderr[-2000:]
    reference = (tmp_path / "build" / "site" / "reference.html").read_text(encoding="utf-8")
    assert "load_student" in reference and "error[CONFIG]" not in reference
    home = tmp_path / "build" / "docs" / "index.md"
    home.write_text(home.read_text() + "\n[nowhere](nowhere.md)\n")
    broken = zensical(tmp_path)
    assert broken.returncode != 0 and "page does not exist" in broken.stderr


def zensical(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "--clean"],
        cwd=folder,
        env=os.environ | {"NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
