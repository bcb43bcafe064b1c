"""From bare questions to an answer of a real server: the commands of docs/from-questions.md, each as a user types it.

The teacher is SmolLM2-135M behind llama.cpp's server, which also serves the trained student. PST_QUESTIONS=300 asks a
few hundred questions instead of the twenty that fit into every run of the tests; the student then gets more steps.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from pst_dist.cli.main import run_verb
from pst_dist.data.sources.generators import arithmetic
from pst_dist.publish.gguf.server import serving
from pst_dist.storage.json_files import read_lines

_NEEDED = ("openai", "tenacity", "httpx", "gguf", "xllamacpp")
_ABSENT = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.encoder,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(_ABSENT), reason=f"needs {', '.join(_ABSENT)}: pip install 'pst-dist[teach,llama-cpp]'"),
]
QUESTIONS = int(os.environ.get("PST_QUESTIONS", "20"))
SAMPLES, TESTS = 2, 8
EXAMPLES = (
    ("Ava has 12 pens. 5 come. How many pens now?", "There were 12 and 5 more came: 12 + 5 = 17.", "17"),
    ("Ron has 19 nuts. 14 go. How many nuts now?", "Of the 19, 14 went away: 19 - 14 = 5.", "5"),
    ("Ivy has 9 eggs. They double. How many eggs now?", "Twice 9 are 9 * 2 = 18.", "18"),
    ("Sol has 3 coins. 4 come. How many coins now?", "There were 3 and 4 more came: 3 + 4 = 7.", "7"),
)


@pytest.fixture(scope="session")
def smollm2_server():
    """The URL of llama.cpp's server of SmolLM2."""
    from pst_dist.models.locate import locate_model

    place = locate_model("smollm2")
    assert place.gguf is not None
    with serving(Path(place.target, place.gguf), slots=4, context=512) as url:
        yield url


def write(path: Path, rows: list[dict]) -> list[dict]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def bare(part: str, count: int) -> list[dict]:
    """Questions of one operation with their answers; the generator's rationales are left out."""
    made = arithmetic(count, 0, part=part, steps=1, largest=20)
    return [{"question": row.question, "answer": row.answer} for row in made]


def test_from_bare_questions_to_a_served_student(tmp_path, monkeypatch, capsys, smollm2_server):
    import httpx

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    questions = write(Path("questions.jsonl"), bare("train", QUESTIONS))
    tests = write(Path("test.jsonl"), bare("test", TESTS))
    write(Path("examples.jsonl"), [{"question": q, "rationale": r, "answer": a} for q, r, a in EXAMPLES])

    asking = ["teach", "questions.jsonl", "task=arithmetic", "-o", "rationales.jsonl", "--model", "smollm2"]
    asking += ["--endpoint", f"{smollm2_server}/v1", "--prompt", "few_shot", "--examples", "examples.jsonl"]
    asking += ["--shots", "4", "--samples", str(SAMPLES), "--reply-tokens", "48", "--concurrency", "4"]
    assert run_verb(asking) == 0
    said = capsys.readouterr().out
    journal = Path("rationales.teach/journal.jsonl")
    replies = [line for line in read_lines(journal) if "key" in line]
    assert len(replies) == QUESTIONS * SAMPLES
    rows = read_lines(Path("rationales.jsonl"))
    gold = {row["question"]: row["answer"] for row in questions}
    assert all(row["answer"] == gold[row["question"]] and row["taught_by"] == "smollm2" for row in rows)
    assert all(any(text in line["text"] for line in replies) for row in rows for text in row["rationales"])
    quality = json.loads(Path("rationales.teach/report.json").read_text())["quality"]
    kept = sum(len(row["rationales"]) for row in rows)
    assert quality["verdicts"]["kept"] == kept and f"{100 * kept / len(replies):.1f} %" in said
    assert len(rows) >= 4, f"too few rationales to go on with: {said}"
    before = journal.read_bytes()
    assert run_verb(asking) == 0 and journal.read_bytes() == before, "nothing is asked twice"
    assert run_verb(["check", "rationales.jsonl", "task=arithmetic"]) == 0

    write_config(steps=60 if QUESTIONS < 100 else 400)
    assert run_verb(["run", "student.yaml"]) == 0
    for made in ("data/shards", "data/embeddings", "best", "eval/test", "export"):
        assert Path("runs/student", made, "manifest.json").is_file()
    capsys.readouterr()
    assert run_verb(["export", "runs/student", "--gguf", "f32"]) == 0
    assert f"0 of {TESTS} test rows (0.0 %) answered differently" in capsys.readouterr().out
    assert run_verb(["verify", "runs/student"]) == 0

    (file,) = Path("runs/student/gguf/f32").glob("*.gguf")
    scored = {row["question"]: row for row in read_lines(Path("runs/student/eval/test/samples.jsonl"))}
    assert scored.keys() == {row["question"] for row in tests}
    with serving(file, slots=2, context=160) as url:
        for question, row in scored.items():
            body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 24}
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False).json()
            (choice,) = reply["choices"]
            assert choice["finish_reason"] == "stop", "it stops by itself, after the answer"
            assert choice["message"]["content"].strip() == row["answer_text"].strip()
            assert reply["usage"]["completion_tokens"] == row["answer_tokens"]


def write_config(steps: int) -> None:
    """student.yaml, as on the page."""
    Path("student.yaml").write_text(
        f"""\
task: arithmetic
arm: pst
output_dir: runs/student
data: {{train: rationales.jsonl, test: test.jsonl, validation_size: 2}}
layout: {{max_length: 128}}
student: {{fresh: {{hidden_size: 64, num_layers: 2, num_heads: 2}}}}
train: {{max_steps: {steps}, eval_steps: {steps}, learning_rate: 5.0e-3, global_batch_size: 8,
         per_device_train_batch_size: 8, num_threads: 1, report_to: none}}
evaluate: {{max_new_tokens: 24, latency_rows: 2, explain_rows: 4}}
"""
    )
