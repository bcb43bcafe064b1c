"""Secrets stay out of everything that is written or printed."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import small_config

from pst_dist.cli.main import run_verb
from pst_dist.config.loading import dump_config, load_config
from pst_dist.errors import ConfigError, EnvironmentFault
from pst_dist.text.redaction import RedactingFormatter, has_secret, is_redacted, redact, redacted_command

CANARY = "canary-3f9a71"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sftp://me:pw@host/x", "sftp://***@host/x"),
        ("ftp://:pw@host", "ftp://***@host"),
        ("https://token@host/x", "https://***@host/x"),
        ("http://me:p@ss/wo@host:80/x", "http://***@host:80/x"),
        ("see s3://b/k?X-Amz-Signature=abc&y=1", "see s3://b/k?X-Amz-Signature=***&y=1"),
        ("env.WANDB_API_KEY=abc train.seed=1", "env.WANDB_API_KEY=*** train.seed=1"),
        ("Authorization: Bearer abcdefghij", "Authorization: Bearer ***"),
        ("hf_abcdefghijklmnopqrstuvwx", "***"),
    ],
)
def test_what_counts_as_a_secret_is_left_out(text, shown):
    assert redact(text) == shown and has_secret(text) and not has_secret(shown)


@pytest.mark.parametrize(
    "text",
    [
        "sftp://someone@host/x",
        "http://head:8265/jobs/a@b",
        "evaluate.max_new_tokens=256 layout.semantic_tokens=2",
        "mail me@example.org about http://host",
        "s3://bucket/path*** and ***",
    ],
)
def test_what_is_none_stays_as_it_is(text):
    assert redact(text) == text and not is_redacted(text)


def test_a_long_hostile_line_takes_no_time():
    started = time.process_time()
    for line in ("://a:" * 20_000 + "@", "token=" * 20_000, "a" * 100_000 + "@=", "Bearer " * 20_000):
        redact(line)
    assert time.process_time() - started < 10


def test_a_command_loses_its_secrets_and_nothing_else():
    words = ["pst", "run", "my.yaml", "env.HF_TOKEN=a 'b' c", "data_dir=sftp://me:pw@host/x y"]
    assert redacted_command(words) == "pst run my.yaml 'env.HF_TOKEN=***' 'data_dir=sftp://***@host/x y'"


def test_log_lines_and_tracebacks_are_redacted():
    try:
        raise ValueError(f"cannot open sftp://me:{CANARY}@host/x")
    except ValueError:
        record = logging.LogRecord("a", 20, "f", 1, "get %s", (f"http://{CANARY}@host",), sys.exc_info())
    line = RedactingFormatter("%(message)s").format(record)
    assert CANARY not in line and "http://***@host" in line and "sftp://***@host/x" in line


# --- the canary: one password in a URL, through the commands ----------------------------------------------------------


def canary_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]


def test_a_password_in_a_url_is_in_no_file_and_no_message(tmp_path):
    """A real run of the first stage, in a process whose command line holds the password."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{n}?", "answer": "{n}", "rationale": "r {n}"}}\n' for n in range(12)))
    words = [f"data.train={rows}", "data.test=null", "data.validation_size=2", "task=null"]
    words += [f"output_dir={tmp_path}/run", f"embed.ray.address=ray://me:{CANARY}@127.0.0.1:1"]
    done = subprocess.run(
        [sys.executable, "-m", "pst_dist.cli", "shard", "demo", "-v", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "command.txt").is_file() and canary_in(tmp_path) == []
    assert CANARY not in done.stdout + done.stderr
    assert "ray://***@127.0.0.1:1" in (tmp_path / "run" / "command.txt").read_text()


def test_the_page_of_a_run_recorded_by_an_earlier_version_shows_no_password(tmp_path):
    from pst_dist.publish.run_page import _record

    (tmp_path / "command.txt").write_text(f"pst run my.yaml data_dir=sftp://me:{CANARY}@host/x\n")
    (tmp_path / "config.resolved.yaml").write_text(f"data_dir: sftp://me:{CANARY}@host/x\n")
    page = "".join(filter(None, _record(tmp_path).values()))
    assert page.count("sftp://***@host/x") == 2 and CANARY not in page


def test_a_run_whose_password_was_not_saved_asks_for_it(tmp_path):
    config = small_config(tmp_path / "data", tmp_path / "run").model_copy(
        update={"data_dir": f"sftp://me:{CANARY}@host/x"}
    )
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump_config(config))
    assert CANARY not in saved.read_text()
    with pytest.raises(ConfigError, match="its password was not saved with the run; set data_dir=… again"):
        load_config(str(saved))
    again = load_config(str(saved), [f"data_dir=sftp://me:{CANARY}@host/x"])
    assert again.data_dir == config.data_dir


@pytest.mark.parametrize("where", ["slurm", "ray"])
def test_a_job_that_would_carry_a_password_is_refused(tmp_path, monkeypatch, capsys, where):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(dump_config(small_config(tmp_path / "data", tmp_path / "run")))
    words = [f"data_dir=sftp://me:{CANARY}@host/x", "data_cache=/cache", "--dry-run"]
    assert run_verb(["submit", where, "my.yaml", *words]) == 2
    out, err = capsys.readouterr()
    assert "data_dir=sftp://***@host/x contains a password" in err and CANARY not in out + err


def test_the_listing_of_a_ray_job_shows_no_password(tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray", reason="needs ray")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(dump_config(small_config(tmp_path / "data", tmp_path / "run")))
    words = [f"address=http://me:{CANARY}@head:8265", f"env.WANDB_API_KEY={CANARY}", "--dry-run"]
    assert run_verb(["submit", "ray", "my.yaml", *words]) == 0
    out, err = capsys.readouterr()
    assert "http://***@head:8265" in out and CANARY not in out + err


def test_an_error_shows_no_password():
    error = EnvironmentFault("no answer", "see http://me:pw@host", path=f"sftp://me:{CANARY}@host/x")
    assert str(error) == "error[ENVIRONMENT] sftp://***@host/x: no answer; see http://***@host"
