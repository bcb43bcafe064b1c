"""Batches that do not fit in memory are decoded in halves, with the same answers and the same files."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evaluated import make_run
from refusing import Refusing
from tiny import ROWS, Tiny

from pst_dist.distributed import device_memory
from pst_dist.distributed.device_memory import DeviceMemory
from pst_dist.errors import EnvironmentFault
from pst_dist.evaluation import evaluate as evaluating
from pst_dist.evaluation.decoder import InProcess
from pst_dist.student.ask import answer_questions
from pst_dist.student.decode_memory import SHARE, row_bytes
from pst_dist.student.explain import decode_explained
from pst_dist.student.generate import decode_answers
from pst_dist.student.saved import load_student

QUESTIONS = [row.question for row in ROWS]
MANY = [*QUESTIONS, "Why?", "A much longer question than the others, so that padding matters?", "2 + 3? 9 - 9", "10"]


def tiny(architecture: str, refusing: Refusing | None = None, arm: str = "pst") -> Tiny:
    """Always the same untrained student."""
    student = Tiny(arm, architecture, seed=5)
    (refusing or Refusing(10**9)).watch(student.model)
    return student


def same(found, wanted) -> None:
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
    assert [answer.text for answer in found] == [answer.text for answer in wanted]
    likely = [answer.probability for answer in wanted]
    # Other rows in a matrix product, and other padding before a row: only the rounding differs.
    assert [answer.probability for answer in found] == pytest.approx(likely, rel=1e-4)


def decoded(student: Tiny, questions=MANY, **settings):
    parts = (student.model, student.tokenizer, student.format, questions)
    return decode_answers(*parts, **{"batch_size": 8, "max_new_tokens": 12, **settings})


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_a_batch_that_does_not_fit_is_decoded_in_halves(architecture, caplog):
    """Eight rows of up to 70 tokens; 300 let half of them through, and 120 a row or two."""
    wanted = decoded(tiny(architecture))
    for tokens, least in ((300, 1), (120, 2)):
        caplog.clear()
        refusing, batches = Refusing(tokens), list[int]()
        with caplog.at_level(logging.WARNING, logger="pst_dist"):
            found = decoded(tiny(architecture, refusing), on_batch=batches.append)
        same(found, wanted)
        said = [record.message for record in caplog.records if "continuing in halves" in record.message]
        assert len(said) == refusing.refused >= least, "once for each halving"
        assert "8 questions of up to" in said[0]
        assert sum(batches) == 8 and max(batches) <= 4


def test_memory_that_runs_out_in_the_middle_of_an_answer_loses_nothing():
    """The prompts of eight rows fit; their caches grow until they do not."""
    wanted = decoded(tiny("gpt2"))
    prompts = Refusing(10**9)
    decoded(tiny("gpt2", prompts))
    refusing = Refusing(prompts.seen[0] + 30)
    same(decoded(tiny("gpt2", refusing)), wanted)
    assert refusing.refused >= 1 and refusing.seen[0] < refusing.tokens, "the first pass was let through"


def test_the_next_batches_begin_with_the_size_that_fitted():
    refusing = Refusing(300)
    student = tiny("gpt2", refusing)
    questions = [f"{'a' * 30} {number}?" for number in range(16)]
    first, second = decoded(student, questions[:8]), decoded(student, questions[8:])
    assert refusing.refused == 1, "the second batch was halved before it was tried"
    same([*first, *second], decoded(tiny("gpt2"), questions))


def test_a_question_that_does_not_fit_is_one_error():
    refusing = Refusing(20)
    with pytest.raises(EnvironmentFault, match=r"a question of 68 tokens, and up to 12 generated, does not") as raised:
        decoded(tiny("gpt2", refusing), [MANY[5]])
    assert "evaluate.max_new_tokens" in raised.value.remedy and str(raised.value).count("\n") == 0


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
@pytest.mark.parametrize("arm", ["pst", "prefix"])
def test_rationales_are_those_of_whole_batches(architecture, arm):
    """Of a causal student that answers first they continue from the cache, which is larger than that of the answers."""

    def explained(refusing: Refusing | None = None):
        student = tiny(architecture, refusing, arm)
        parts = (student.model, student.tokenizer, student.format, MANY)
        return decode_explained(*parts, batch_size=8, max_new_tokens=24)

    answers, rationales = explained()
    seen = Refusing(10**9)
    explained(seen)
    for tokens in (max(seen.seen) - 1, max(seen.seen) // 2, 150):
        refusing = Refusing(tokens)
        found = explained(refusing)
        same(found[0], answers)
        assert found[1] == rationales and refusing.refused >= 1


def memory(free: float) -> DeviceMemory:
    return DeviceMemory("a GPU for a test", free=round(free), held=10**6)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_what_would_not_fit_by_the_estimate_is_not_tried(architecture, monkeypatch):
    student = tiny(architecture)
    wanted = decoded(student)
    longest = max(len(student.layout.prompt_ids(question)) for question in MANY)
    a_row = row_bytes(student.model, longest, 1 if architecture == "t5" else 0, 12)
    for rows, sizes in ((8, [8]), (4, [4, 4]), (7.9, [4, 4])):
        monkeypatch.setattr(device_memory, "read_memory", lambda device, rows=rows: memory(rows * a_row / SHARE + 9))
        batches: list[int] = []
        same(decoded(student, on_batch=batches.append), wanted)
        assert batches == sizes
        # Who sets a limit of tokens gets it.
        batches.clear()
        same(decoded(student, on_batch=batches.append, batch_tokens=10**6), wanted)
        assert batches == [8]


def test_the_bytes_of_a_row_are_those_worked_out_by_hand():
    """Two layers of width 32 and two heads in float32; prompt 10, then 20 tokens."""
    keys, logits, mask = 2 * 32 * 4, 5 * 4 * 264, 10 * 10 * 4
    read = 10 * (6 * 32 + 3 * 128 + 32 + 2 * 32) * 4
    assert row_bytes(tiny("gpt2").model, 10, 0, 20) == (2 + 1) * keys * 30 + read + mask + logits
    half = tiny("gpt2").model.to(torch.bfloat16)
    assert row_bytes(half, 10, 0, 20) == ((2 + 1) * keys * 30 + read + mask) / 2 + (4 * 4 + 2) * 264
    # A T5 keeps keys of the prompt too, and scores for its biases: two heads, in three copies.
    scores = 10 * 10 * 2 * (4 + 2 * 4)
    assert row_bytes(tiny("t5").model, 10, 1, 20) == (2 + 1) * keys * 31 + read + scores + logits
    assert row_bytes(torch.nn.Linear(1, 1), 10, 0, 20) is None


PEAK = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from pst_dist.student.decode_memory import row_bytes

def size(which):
    line = next(line for line in open("/proc/self/status") if line.startswith(which))
    return int(line.split()[1]) * 1024

config = AutoConfig.for_model(**json.loads(sys.argv[1]))
family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
model = family.from_config(config).eval()
ids = torch.randint(2, 7999, (16, 300))
mask = torch.ones_like(ids)
mask[0, :150] = 0
settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
model.generate(input_ids=ids[:1, :8], attention_mask=mask[1:2, :8], **settings)
open("/proc/self/clear_refs", "w").write("5")
before = size("VmRSS")
model.generate(input_ids=ids, attention_mask=mask, **settings)
print(16 * row_bytes(model, 300, int(config.is_encoder_decoder), 8) / (size("VmHWM") - before))
"""
COMMON = {"vocab_size": 8000, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
MODELS = {
    "gpt2": {"n_embd": 512, "n_layer": 8, "n_head": 8, "n_positions": 512},
    "llama": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "t5": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8, "decoder_start_token_id": 1},
}


@pytest.mark.parametrize(("architecture", "most"), [("gpt2", 1.5), ("llama", 1.8), ("t5", 4)])
def test_a_batch_takes_no_more_memory_than_estimated(architecture, most):
    """The peak of a process over what it held before. Measured: 1.05 (gpt2), 1.22 (llama), 3.1 (t5) times as much."""
    model = {"model_type": architecture, **MODELS[architecture], **COMMON}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, json.dumps(model)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.95 < float(done.stdout.splitlines()[-1]) < most


class Counting(InProcess):
    """Decodes here, and notes the digests of the batches."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def run(self, config, student, todo, done, bar):
        # Those of rationales hold the answers with their probabilities, which differ by rounding.
        self.digests += [batch.digest for batch in todo if batch.answers is None]
        yield from super().run(config, student, todo, done, bar)


def test_an_evaluation_writes_what_it_writes_with_enough_memory(tmp_path, monkeypatch):
    """The batches, whose digests name the files of finished ones, stay as they are planned."""

    def evaluated(path: Path, refusing: Refusing):
        def load(*args, **kwargs):
            student = load_student(*args, **kwargs)
            refusing.watch(student.model)
            return student

        monkeypatch.setattr(evaluating, "load_student", load)
        config = make_run(path, batch_size=6, latency_rows=0)
        counting = Counting()
        results = evaluating.evaluate(config, executor=counting)
        lines = (path / "eval" / "test" / "samples.jsonl").read_text().splitlines()
        return results, [json.loads(line) for line in lines], counting.digests

    whole, rows, planned = evaluated(tmp_path / "whole", Refusing(10**9))
    refusing = Refusing(80)
    halved, found, digests = evaluated(tmp_path / "halved", refusing)
    assert refusing.refused >= 1 and digests == planned and len(digests) >= 1
    assert halved["accuracy"] == whole["accuracy"]
    for one, two in zip(rows, found, strict=True):
        close = {
            key: pytest.approx(value, rel=1e-3) if isinstance(value, float) else value for key, value in one.items()
        }
        assert two == close


def test_asking_many_questions_continues_in_halves(tmp_path):
    student = Tiny("pst", seed=5)
    student.save(tmp_path)

    def asked(refusing: Refusing):
        loaded = load_student(tmp_path, "cpu")
        refusing.watch(loaded.model)
        return answer_questions(loaded, MANY, explain=True, max_new_tokens=12, batch_size=8)

    wanted, refusing = asked(Refusing(10**9)), Refusing(200)
    found = asked(refusing)
    assert refusing.refused >= 1
    assert [(one.text, one.tokens, one.rationale) for one in found] == [
        (one.text, one.tokens, one.rationale) for one in wanted
    ]


@pytest.mark.gpu
def test_a_gpu_with_little_memory_gives_the_answers_of_one_with_much():
    student = tiny("llama")
    student.model.to("cuda")
    questions = MANY * 64
    wanted = decoded(student, questions, batch_size=512, max_new_tokens=64)
    torch.cuda.synchronize()
    used, total = torch.cuda.max_memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(used / 3 / total)
    batches: list[int] = []
    try:
        found = decoded(student, questions, batch_size=512, max_new_tokens=64, on_batch=batches.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert max(batches) < 512
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in wanted]
