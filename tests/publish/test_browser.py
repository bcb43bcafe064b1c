"""Pages in a real browser: no error on its console, no request to another place, nothing wider than a phone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from evaluated import scored

from pst_dist.publish.run_page import compare_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")


POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""With this policy in a page, a request to any place is refused and becomes an error on the console."""


def visited(html: str, folder: Path, *options: str) -> tuple[list[str], str]:
    """(console messages, document) of a page after its scripts have run; the browser itself finds no host."""
    page = folder / "page.html"
    page.write_text(html.replace("<head>", f'<head><meta http-equiv="Content-Security-Policy" content="{POLICY}">'))
    done = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update"),
            *(f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=2000"),
            *("--dump-dom", *options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return re.findall(r"CONSOLE.*", done.stderr), done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("pages")
    runs = [scored(folder / "a", "answer_only", "0101" * 5), scored(folder / "b", "pst", "1101" * 5)]
    return compare_report(runs, folder / "page.html").read_text()


def test_a_page_logs_nothing_and_fetches_nothing(page, tmp_path):
    console, document = visited(page, tmp_path)
    assert console == [] and "pst answers" in document


@pytest.mark.parametrize("fault", ['<script>console.error("ouch")</script>', '<img src="http://127.0.0.1:9/x.png">'])
def test_a_page_that_did_either_would_be_noticed(fault, page, tmp_path):
    console, _ = visited(page.replace("</main>", fault + "</main>"), tmp_path)
    assert len(console) == 1


def test_no_part_of_it_is_wider_than_a_phone(page, tmp_path):
    script = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></main>"
    _, document = visited(page.replace("</main>", script), tmp_path, "--window-size=500,900")
    wide, room = re.search(r"<title>(\d+) of (\d+)</title>", document).groups()
    assert int(wide) <= int(room)
