"""`pst export --push-to-hub`, in a process of its own, through the real client to a hub on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluated import make_run
from hub_server import Hub, hub_server

from pst_dist.config.run_dir import record_run
from pst_dist.errors import ConfigError
from pst_dist.publish.export import export
from pst_dist.publish.hub import plan

SECRET = "hf_secretsecretsecret"
REPO = "someone/a-student"


@pytest.fixture
def hub():
    with hub_server() as hub:
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "run"
    record_run(make_run(path))
    return path


def pst(hub: Hub, run: Path, *words: str, token: str | None = SECRET) -> subprocess.CompletedProcess[str]:
    """One `pst export` whose home, caches and working directory are below the run's parent."""
    home = run.parent / "home"
    home.mkdir(exist_ok=True)
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        **({"HF_TOKEN": token} if token else {}),
    }
    words = (sys.executable, "-m", "pst_dist.cli", "export", str(run), *words)
    return subprocess.run(words, env=environment, cwd=home, capture_output=True, text=True, timeout=300)


def test_nothing_is_sent_before_yes_and_then_every_byte_arrives_in_a_private_repository(hub, run):
    without = pst(hub, run, "--push-to-hub", REPO)
    assert without.returncode == 2 and "the card names no licence; run `pst export --license ID`" in without.stderr
    shown = pst(hub, run, "--license", "apache-2.0", "--push-to-hub", REPO)
    assert shown.returncode == 0, shown.stderr
    assert f"{REPO} (private): " in shown.stdout and "model.safetensors" in shown.stdout
    assert "licence apache-2.0; base model: none named; data sets: none named" in shown.stdout
    assert "nothing was sent; add --yes to upload" in shown.stdout
    assert hub.requests == []

    sent = pst(hub, run, "--push-to-hub", REPO, "--yes")  # the licence of the export stays
    assert sent.returncode == 0, sent.stderr
    assert f"{hub.url}/{REPO}/commit/" in sent.stdout
    folder = run / "export"
    assert hub.repos[REPO] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.private == {REPO: True} and hub.tokens == {f"Bearer {SECRET}"}
    assert hub.messages[0].startswith("pst-dist export ")
    assert b"license: apache-2.0" in hub.repos[REPO]["README.md"]
    for path in run.parent.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_a_gguf_file_goes_with_the_export(hub, run):
    pytest.importorskip("gguf")
    sent = pst(hub, run, "--license", "mit", "--gguf", "f16", "--push-to-hub", REPO, "--public", "--yes")
    assert sent.returncode == 0, sent.stderr
    assert hub.private == {REPO: False}
    folder = run / "gguf" / "f16"
    gguf = {name: content for name, content in hub.repos[REPO].items() if name.startswith("gguf/")}
    assert gguf == {f"gguf/f16/{path.name}": path.read_bytes() for path in folder.iterdir()}


def test_a_public_repository_is_not_filled_by_mistake(hub, run):
    hub.repos[REPO], hub.private[REPO] = {}, False
    refused = pst(hub, run, "--license", "mit", "--push-to-hub", REPO, "--yes")
    assert refused.returncode == 2 and f"{REPO} exists and is public; add --public" in refused.stderr
    assert hub.repos[REPO] == {}


def test_refusals_are_one_line_without_the_token(hub, run):
    none = pst(hub, run, "--license", "mit", "--push-to-hub", REPO, "--yes", token=None)
    assert none.returncode == 4 and "HF_TOKEN is not set" in none.stderr and hub.requests == []
    hub.fail = 403
    refused = pst(hub, run, "--push-to-hub", REPO, "--yes")
    (line,) = (line for line in refused.stderr.splitlines() if line.startswith("pst:"))
    assert refused.returncode == 4 and f"the hub refused {REPO}" in line and "403" in line
    assert SECRET not in refused.stderr + refused.stdout and "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["alone", "a/b/c", "a b/c", "../x"])
def test_a_name_that_is_no_repository_is_refused(name, tmp_path):
    config = make_run(tmp_path / "run")
    folder = export(config, licence="mit")
    with pytest.raises(ConfigError, match="give NAME/REPO"):
        plan(folder, name)
