"""Two real servers answer first and stop by themselves: `transformers serve` and llama.cpp, alone and many at once.

`launchers/check_serving.py`, which users run against servers that do not run here, does the asking.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from evaluated import make_run
from talking import TALKS
from transformers_server import transformers_server

from pst_dist.arms import ARMS
from pst_dist.evaluation.evaluate import evaluate
from pst_dist.publish.export import export
from pst_dist.publish.gguf.artefact import export_gguf
from pst_dist.publish.gguf.server import serving
from pst_dist.student.saved import load_student

SCRIPT = Path(__file__).parents[2] / "launchers" / "check_serving.py"
SAMPLES = "eval/test/samples.jsonl"
WAYS = ("completions, one by one", "completions, 8 at once", "chat, one by one", "chat, 8 at once")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An evaluated and exported run; two of its six answers are wrong, and recorded as they are."""
    path = tmp_path_factory.mktemp("serving") / "run"
    config = make_run(path)
    evaluate(config)
    export(config)
    return path


def check(url: str, folder: Path, *words: str) -> tuple[int, str]:
    """What the script says, run as a user does, without this package on its path."""
    command = [sys.executable, "-I", str(SCRIPT), url, str(folder), "--max-tokens", "40", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def equal(told: str) -> bool:
    """Whether every way of asking gave the recorded answers, each ended by itself."""
    return all(f"{way}: 0 of 6 answered differently, 0 did not stop by themselves" in told for way in WAYS)


@pytest.mark.skipif(
    importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None,
    reason="transformers serve needs fastapi and uvicorn",
)
def test_transformers_serve_gives_the_recorded_answers(run):
    with transformers_server(run / "export") as url:
        code, told = check(url, run / "export")
    assert code == 0 and equal(told), told


def test_a_llama_cpp_server_gives_the_recorded_answers_and_another_student_does_not(run, tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    from pst_dist.config.schema import Config

    config = Config.model_validate({**make_run(tmp_path / "unused").model_dump(), "output_dir": str(run)})
    made = export_gguf(config, "q8_0")
    with serving(made.file, slots=4, context=96) as url:
        code, told = check(f"{url}/v1/", run / "export")
        assert code == 0 and equal(told), told
        # Recorded answers of another student must be noticed.
        samples = [json.loads(line) for line in (run / "eval/test/samples.jsonl").read_text().splitlines()]
        samples[1]["answer_text"] = " 18"
        other = tmp_path / "samples.jsonl"
        other.write_text("".join(json.dumps(row) + "\n" for row in samples))
        code, told = check(url, run / "export", "--answers", str(other))
        assert code == 1 and "1 of 6 answered differently" in told and "'17' instead of '18'" in told
        # An answer that the limit cut did not stop by itself.
        shutil.copyfile(run / "eval/test/samples.jsonl", other)
        code, told = check(url, run / "export", "--answers", str(other), "--max-tokens", "1")
        assert code == 1 and "6 did not stop by themselves" in told


def test_a_served_gguf_answers_conversations_as_they_were_scored(talking_run):
    """The script asks turns; as one text they would have other answers."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    run = Path(talking_run.output_dir)
    made = export_gguf(talking_run, "f32")
    assert made.comparison is not None
    assert (made.comparison.rows, made.comparison.different, made.comparison.correct) == (4, 0, 4)
    with serving(made.file, slots=4, context=160) as url:
        code, told = check(url, run / "export")
    assert code == 0 and all(f"{way}: 0 of 4 answered differently" in told for way in WAYS), told


@pytest.mark.parametrize("arm", sorted(ARMS))
def test_the_script_has_the_prompt_of_every_arm(arm, talking_run):
    student = load_student(Path(talking_run.output_dir) / "export", device="cpu")
    fmt = dataclasses.replace(student.format, arm=arm)
    script = runpy.run_path(str(SCRIPT))
    rows = [json.loads(line) for line in (Path(talking_run.output_dir) / SAMPLES).read_text().splitlines()]
    assert [len(row.get("turns", [])) for row in rows] == [0, 2, 3, 4]
    for row, sample in zip(rows, TALKS, strict=True):
        assert script["prompt_of"](fmt.to_json(), row) == fmt.render(fmt.asked(sample))


def test_the_script_says_what_it_could_not_do(run, tmp_path):
    code, told = check("http://127.0.0.1:9", run / "export", "--no-chat")
    assert code == 1 and "no answers" in told and "chat" not in told
    code, told = check("http://127.0.0.1:9", tmp_path)
    assert code == 2 and "cannot read the export" in told
