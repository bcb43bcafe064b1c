"""Runs of students that start from an encoder: a tiny BERT with MiniLM's tokenizer, in a folder as any other."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import launch, stop_at
from run_files import curve
from safetensors.torch import load_file
from small_run import small_config
from tiny import ROWS, Tiny

from pst_dist.arms import STOP_TOKEN
from pst_dist.config.schema import Config
from pst_dist.models.locate import locate_encoder
from pst_dist.pipeline import run_all
from pst_dist.publish.export import export
from pst_dist.storage.manifest import read_json
from pst_dist.student.generate import decode_answers, decode_rationales
from pst_dist.student.saved import load_student
from pst_dist.training.trainer import train

pytestmark = pytest.mark.encoder
SHAPES = ("causal", "encoder_decoder")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A BERT of two narrow layers without dropout, so that ranks and one process can be compared."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert") / "encoder"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128}
    BertModel(BertConfig(vocab_size=30522, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(locate_encoder("minilm")).save_pretrained(folder)
    return folder


def student(encoder, shape):
    return {"student__model_name_or_path": encoder, "student__warm_start": shape, "layout__max_length": 96}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_way_from_rows_to_a_report(shape, encoder, small_data, tmp_path):
    run = tmp_path / "run"
    run_all(small_config(small_data, run, arm="pst", **student(encoder, shape)))
    results = read_json(run / "eval" / "test" / "results.json")
    assert results["rows"] == 12 and results["tokens_to_answer"]["mean"] > 0
    losses = [row["loss"] for row in curve(run)]
    assert losses[-1] < losses[0]
    card = (run / "export" / "README.md").read_text()
    assert "an encoder whose weights the student started from" in card and str(encoder) not in card
    trained, exported = load_student(run / "best").model.state_dict(), load_student(run / "export").model.state_dict()
    assert trained.keys() == exported.keys()
    assert all(torch.equal(value, exported[name]) for name, value in trained.items())


STRANGER = """
import json, sys
sys.modules["pst_dist"] = None
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
folder, questions = sys.argv[1], json.loads(sys.argv[2])
seq2seq = AutoConfig.from_pretrained(folder).is_encoder_decoder
model, report = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(
    folder, output_loading_info=True
)
assert not report["missing_keys"] and not report["unexpected_keys"], report
tokenizer = AutoTokenizer.from_pretrained(folder)
told = []
for question in questions:
    inputs = tokenizer(question + " ###", return_tensors="pt")
    new = model.generate(**inputs)[0][1 if seq2seq else inputs["input_ids"].shape[1]:]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    text = tokenizer.decode(new, skip_special_tokens=True)
    told.append([new.tolist(), text, chat == inputs["input_ids"][0].tolist()])
print(json.dumps(told))
"""


@pytest.mark.parametrize("shape", SHAPES)
def test_a_program_of_somebody_elses_gets_the_learnt_answers_and_stops(shape, encoder, tmp_path):
    import json

    tiny = Tiny("pst", student={"model_name_or_path": str(encoder), "warm_start": shape})
    assert type(tiny.model).__name__ == ("BertGenerationDecoder" if shape == "causal" else "EncoderDecoderModel")
    tiny.fit()
    config = Config.model_validate({**tiny.config.model_dump(), "output_dir": str(tmp_path)})
    tiny.save(tmp_path / "best")
    questions = [row.question for row in ROWS]
    told = subprocess.run(
        [sys.executable, "-c", STRANGER, str(export(config)), json.dumps(questions)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    answers = json.loads(told.stdout.splitlines()[-1])
    settings = {"batch_size": 4, "max_new_tokens": 40}
    ours = decode_answers(tiny.model, tiny.tokenizer, tiny.format, questions, **settings)
    stop = tiny.tokenizer.convert_tokens_to_ids(STOP_TOKEN)
    for (ids, text, chat), mine, row in zip(answers, ours, ROWS, strict=True):
        assert (ids, text) == (mine.token_ids, mine.text)
        assert text.strip() == row.answer and ids[-1] == stop and chat
    reasons = decode_rationales(tiny.model, tiny.tokenizer, tiny.format, questions, ours, **settings)
    assert [reason.replace(" ,", ",") for reason in reasons] == [row.rationales[0] for row in ROWS]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_a_stopped_run_goes_on_to_the_same_bits_and_every_zero_stage_follows_one_process(encoder, small_data, tmp_path):
    cases = []
    for shape in SHAPES:
        settings = student(encoder, shape) | {"train__save_steps": 4, "arm": "pst"}
        single = small_config(small_data, tmp_path / f"{shape}-single", **settings)
        train(single)
        stop_at(tmp_path / f"{shape}-single", 4, tmp_path / f"{shape}-again")
        train(small_config(small_data, tmp_path / f"{shape}-again", **settings))
        for name in ("model.safetensors", "alignment_head.safetensors"):
            one, two = (load_file(tmp_path / f"{shape}-{which}" / "best" / name) for which in ("single", "again"))
            assert all(torch.equal(one[key], two[key]) for key in one), shape
        for stage in ("zero1", "zero3"):
            cases.append(small_config(small_data, tmp_path / f"{shape}-{stage}", train__deepspeed=stage, **settings))
    launch(cases, tmp_path)
    for shape in SHAPES:
        plain = [row["loss"] for row in curve(tmp_path / f"{shape}-single")]
        for stage in ("zero1", "zero3"):
            run = tmp_path / f"{shape}-{stage}"
            assert [row["loss"] for row in curve(run)] == pytest.approx(plain, rel=1e-5), run.name
            assert load_student(run / "best").model.config.is_encoder_decoder is (shape == "encoder_decoder")
