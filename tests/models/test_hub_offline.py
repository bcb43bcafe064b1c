"""A hub that does not answer: one short request, then only the cache, also for models that are in it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import zoo

COMMIT = "0" * 40


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """A cache of its own, and an endpoint on loopback that refuses connections."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    own = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "no_proxy": "127.0.0.1"}
    return {key: value for key, value in os.environ.items() if "OFFLINE" not in key} | own


def preview(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pst_dist.cli", "preview", "demo", "student.model_name_or_path=org/tiny", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def put_into_cache(model: Path, cache: Path) -> None:
    folder = cache / "models--org--tiny"
    shutil.copytree(model, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


def test_a_model_in_the_cache_is_loaded_without_asking_for_each_file(tmp_path, environment):
    put_into_cache(zoo.make("gpt2", tmp_path / "model"), tmp_path / "hub")
    done = preview(environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("does not answer") == 1 and "using only what is in the cache" in done.stderr
    assert "Retrying" not in done.stderr and "thrown while requesting" not in done.stderr


def test_a_model_that_is_not_in_the_cache_is_refused_at_once(environment):
    done = preview(environment)
    assert done.returncode == 4
    assert done.stderr.count("does not answer") == 1 and "Retrying" not in done.stderr
    assert "org/tiny: cannot load the student's tokenizer: it is not in the cache and cannot be fetched" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_answers_with_an_error_does_not_make_the_process_offline(tmp_path, environment):
    code = (
        "import http.server, threading, os\n"
        "class Hub(http.server.BaseHTTPRequestHandler):\n"
        "    def do_HEAD(self): self.send_error(503)\n"
        "    def log_message(self, *_): pass\n"
        "server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)\n"
        "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
        "os.environ['HF_ENDPOINT'] = f'http://127.0.0.1:{server.server_port}'\n"
        "from pst_dist.models.hub import use_cache_without_hub, went_offline\n"
        "from huggingface_hub import constants\n"
        "assert went_offline() == ''\n"
        "use_cache_without_hub()\n"
        "assert went_offline() == '' and not constants.HF_HUB_OFFLINE\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
