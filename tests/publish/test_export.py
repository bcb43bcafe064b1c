"""The exported folder must answer in a program that knows nothing of this package, and stop by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny import ROWS, Tiny, fitted

from pst_dist.arms import STOP_TOKEN
from pst_dist.config.schema import Config
from pst_dist.errors import DivergedError, InputError
from pst_dist.publish.card_facts import CardFacts
from pst_dist.publish.export import export
from pst_dist.publish.model_card import card_data, model_card
from pst_dist.storage.manifest import Manifest, describe_files, read_manifest, verify_files, write_json, write_manifest
from pst_dist.student.generate import decode_answers, decode_rationales
from pst_dist.student.saved import load_student

# A program of somebody else: plain transformers, our package blocked, the code taken from the model card as it stands.
STRANGER = """
import contextlib, importlib.abc, io, json, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pst_dist":
            raise ModuleNotFoundError("No module named 'pst_dist'", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import pst_dist
    raise SystemExit("pst_dist can be imported")
except ModuleNotFoundError:
    pass

def ask(folder, question):
    # The code of the model card for one question; the chat template must give the same prompt.
    card = open(folder + "/README.md", encoding="utf-8").read()
    names, printed, chat = {}, [], None
    for block in [part.split("```")[0] for part in card.split("```python")[1:]]:
        code = block.replace('"path/to/this/folder"', repr(folder))
        code = code.replace('question = "…"', f"question = {question!r}")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(code, names)
        if not printed and names["tokenizer"].chat_template:
            messages = [{"role": "system", "content": "x"}, {"role": "user", "content": question}]
            ids = names["tokenizer"].apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            chat = ids["input_ids"] == names["inputs"]["input_ids"][0].tolist()
        printed.append(output.getvalue().strip())
    eos = names["model"].generation_config.eos_token_id
    return {"printed": printed, "new": names["new"].tolist(), "chat": chat, "eos": eos}


questions = json.loads(sys.argv[1])
print(json.dumps({folder: [ask(folder, question) for question in questions] for folder in sys.argv[2:]}))
"""

CASES = {
    "pst-gpt2": ("pst", "gpt2", {}),
    "post_thinking-llama": ("post_thinking", "llama", {}),
    "pst-t5": ("pst", "t5", {}),
    "semantic-before-gpt2": ("pst", "gpt2", {"semantic_position": "before", "semantic_tokens": 2}),
    "semantic-before-t5": ("pst", "t5", {"semantic_position": "before"}),
    "pre_thinking-gpt2": ("pre_thinking", "gpt2", {}),
    "prefix-with-an-odd-prompt": ("prefix", "llama", {"prompt": 'Q: {question}\nA "it\'s" {here}:'}),
}
QUESTIONS = [*(row.question for row in ROWS), "What is 11 + 7?"]


def exported(path: Path, tiny: Tiny) -> Path:
    """The tiny student saved as training leaves it, and exported."""
    config = Config.model_validate(
        {**tiny.config.model_dump(), "output_dir": str(path), "evaluate": {"max_new_tokens": 40}}
    )
    tiny.save(path / "best")
    return export(config)


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, list[dict]]:
    """What the stranger's program got out of every case: one process, isolated (-I), in another directory."""
    path = tmp_path_factory.mktemp("strangers")
    folders = {name: str(exported(path / name, fitted(arm, kind, **lay))) for name, (arm, kind, lay) in CASES.items()}
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, json.dumps(QUESTIONS), *folders.values()],
        cwd=path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return {name: answers[folder] for name, folder in folders.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_program_without_this_package_gets_the_same_answers_and_stops_by_itself(told, case):
    tiny = fitted(CASES[case][0], CASES[case][1], **CASES[case][2])
    ours = decode_answers(tiny.model, tiny.tokenizer, tiny.format, QUESTIONS, batch_size=8, max_new_tokens=40)
    reasons = decode_rationales(
        tiny.model, tiny.tokenizer, tiny.format, QUESTIONS, ours, batch_size=8, max_new_tokens=40
    )
    stop = tiny.tokenizer.convert_tokens_to_ids(STOP_TOKEN)
    for answer, mine, reason in zip(told[case], ours, reasons, strict=True):
        assert answer["printed"][0] == mine.answer_text.strip()
        assert answer["new"] == mine.token_ids
        assert stop in answer["eos"]
        if len(answer["printed"]) > 1 and mine.complete:
            assert answer["printed"][1] == reason
    for answer, row in zip(told[case], ROWS, strict=False):
        assert answer["printed"][0] == row.answer
        assert answer["new"][-1] == stop and answer["new"].count(stop) == 1
        assert answer["printed"][1:] in ([], [row.rationales[0]])
    assert len(told[case][0]["printed"]) == (1 if case.startswith("pre_thinking") else 2)


def test_chat_templates_render_the_trained_prompt_wherever_a_template_can(told):
    # Before an encoder-decoder's answer the semantic token is the decoder's: no template reaches it.
    given = {name: {answer["chat"] for answer in answers} for name, answers in told.items()}
    assert given.pop("semantic-before-t5") == {None}
    assert all(values == {True} for values in given.values()), given


def test_an_encoder_decoder_with_its_semantic_token_before_the_answer_needs_no_decoder_prefix(tmp_path):
    folder = exported(tmp_path / "run", fitted("pst", "t5", semantic_position="before"))
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    plain = model.generate(**tokenizer(f"{ROWS[1].question} ###", return_tensors="pt"))
    assert tokenizer.decode(plain[0], skip_special_tokens=True).strip() == ROWS[1].answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> tuple[Config, Path, Tiny]:
    """An export of an untrained student with an evaluation beside it."""
    path = tmp_path_factory.mktemp("export")
    tiny = Tiny("pst", task="single_eq")
    config = Config.model_validate({**tiny.config.model_dump(), "output_dir": str(path / "run")})
    student = tiny.save(path / "run" / "best")
    results = {
        "task": "single_eq",
        "split": "test",
        "rows": 200,
        "accuracy": 0.8,
        "accuracy_stderr": 0.0282842712,
        "chance": None,
        "tokens_to_answer": {"mean": 3.25},
        "milliseconds_to_answer": {"median": 4.0},
        "device": "cpu",
        "student": {"digest": student.digest},
    }
    for split, digest in (("test", student.digest), ("validation", "another student")):
        directory = path / "run" / "eval" / split
        write_json(directory / "results.json", {**results, "split": split, "student": {"digest": digest}})
        files = describe_files(directory, ["results.json"])
        write_manifest(directory, Manifest("evaluation", "f", files))
    return config, export(config), tiny


def test_the_export_holds_what_a_plain_program_needs_and_no_training_part(folder):
    config, path, _ = folder
    names = {entry.name for entry in path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "README.md"} <= names
    assert "alignment_head.safetensors" not in names
    manifest = read_manifest(path, "export")
    assert manifest is not None and set(manifest.files) == names - {"manifest.json"}
    verify_files(path, manifest)
    assert manifest.extra["student"] == read_manifest(Path(config.output_dir) / "best", "student").digest


def test_the_cards_front_matter_is_read_by_the_hub_library(folder):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder[1] / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model is None
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    # The validation results are another student's, so only those on test are there.
    assert scores == {"accuracy": 80.0, "accuracy_stderr": 2.83, "tokens_to_answer": 3.25}
    assert "| single_eq test | 200 | 80.00 % | 2.83 | unknown | 3.2 | 4 |" in card.text


def test_the_metadata_of_a_card_comes_back_from_the_file_unchanged(folder):
    from huggingface_hub import ModelCard

    config, path, tiny = folder
    student = load_student(path)
    evaluations = [
        {
            "task": "single_eq",
            "split": split,
            "rows": 9,
            "accuracy": share,
            "accuracy_stderr": 0.1,
            "chance": 0.5,
            "tokens_to_answer": {"mean": 4.0},
            "milliseconds_to_answer": None,
            "device": "cpu",
        }
        for split, share in (("test", 0.75), ("validation", 1.0))
    ]
    facts = CardFacts(config, tiny.format, student.manifest, evaluations, None, {"shards": None}, tiny.model)
    data = ModelCard(model_card(facts)).data
    assert data.to_dict() == card_data(facts).to_dict() and data.model_name == "pst-single_eq-gpt2"
    told = [(r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results]
    assert told[0] == ("test", "accuracy", 75.0) and told[3] == ("validation", "accuracy", 100.0) and len(told) == 6
    for ours, theirs in zip(card_data(facts).eval_results, data.eval_results, strict=True):
        assert ours.is_equal_except_value(theirs) and ours.metric_value == theirs.metric_value


def test_a_card_mentions_a_chat_template_only_where_the_tokenizer_has_one(folder, tmp_path):
    assert "chat template" in (folder[1] / "README.md").read_text()
    without = exported(tmp_path / "run", fitted("pst", "t5", semantic_position="before"))
    assert "chat template" not in (without / "README.md").read_text()


def test_a_hub_model_stands_in_the_card_as_base_model_and_a_local_folder_does_not(folder, tmp_path):
    config, path, tiny = folder
    student = load_student(path)

    def matter(name: str) -> dict:
        named = config.model_copy(update={"student": config.student.model_copy(update={"model_name_or_path": name})})
        return card_data(CardFacts(named, tiny.format, student.manifest, [], None, {}, tiny.model)).to_dict()

    assert matter("openai-community/gpt2")["base_model"] == "openai-community/gpt2"
    assert "base_model" not in matter(str(tmp_path))


def card(folder, *, extra=None, results=None, **changes: dict) -> str:
    config, path, tiny = folder
    student = load_student(path)
    values = config.model_dump()
    for section, fields in changes.items():
        values[section] = {**values[section], **fields}
    manifest = replace(student.manifest, extra={**student.manifest.extra, **(extra or {})})
    results = json.loads((path.parent / "eval" / "test" / "results.json").read_text()) | (results or {})
    facts = CardFacts(
        Config.model_validate(values), tiny.format, manifest, [results], None, {"shards": None}, tiny.model
    )
    return model_card(facts)


def test_a_card_tells_no_path_of_the_machine_it_was_made_on(folder, tmp_path):
    for place in (str(tmp_path), "/gone/gpt2", "~/gpt2", "../gpt2", "a/b/gpt2"):
        text = card(folder, student={"model_name_or_path": place})
        assert place not in text and "a model from a local folder" in text


def test_a_card_claims_no_alignment_and_no_choice_that_did_not_happen(folder):
    assert "aligned with a sentence embedding of the teacher's rationale" in card(folder)
    assert "is not aligned with anything" in card(folder, loss={"alignment_weight": 0.0})
    assert "another row's teacher rationale (a control)" in card(folder, loss={"control": "shuffle_embeddings"})
    assert "No rows were used to choose" in card(folder, extra={"answer_nll": None})
    assert "chosen on validation rows only" in card(folder, extra={"answer_nll": 0.5})
    assert "bytes as tokens" in card(folder)


def test_a_card_says_whether_explanations_reach_the_answer(folder):
    share = {"rows": 50, "share": 0.92, "stderr": 0.0384}
    text = card(folder, results={"explanations": {"agree": share, "follows_other": None}})
    assert "| explanations that reach the student's own answer | 92.0 % ± 3.8 (50 rows) |\n\nOnly explanations" in text
    assert "another row's answer:" not in text
    assert "Only explanations" not in card(folder, results={"explanations": None})


def test_the_export_names_what_the_student_was_trained_from_not_what_lies_there_today(tmp_path):
    tiny = Tiny("pst")
    config = Config.model_validate({**tiny.config.model_dump(), "output_dir": str(tmp_path)})
    tiny.save(tmp_path / "best", shards="of then")
    write_json(tmp_path / "train.json", {"fingerprint": "f" * 64, "embeddings": "those of then"})
    for kind in ("shards", "embeddings"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        write_manifest(tmp_path / "data" / kind, Manifest(kind, "today", {}, {"encoder": {"encoder": "today's"}}))
    path = export(config)
    extra = read_manifest(path, "export").extra
    assert (extra["shards"], extra["embeddings"]) == ("of then", "those of then")
    text = (path / "README.md").read_text()
    assert "`of then`" in text and "today's" not in text


def test_a_second_export_is_a_no_op_and_a_damaged_one_is_made_again(folder):
    config, path, _ = folder
    stamp = (path / "manifest.json").stat().st_mtime_ns
    assert export(config) == path and (path / "manifest.json").stat().st_mtime_ns == stamp
    whole = (path / "README.md").read_text()
    (path / "README.md").write_text("spoilt")
    export(config)
    assert (path / "README.md").read_text() == whole


def test_generation_never_runs_past_the_positions_of_the_model(folder):
    path = folder[1]
    settings = json.loads((path / "generation_config.json").read_text())
    # 96 positions, sequences of up to 96 tokens and 256 new ones: only a limit on the whole text is safe.
    assert settings["max_length"] == 96 and settings.get("max_new_tokens") is None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    long = tokenizer("a long question " * 5, return_tensors="pt")
    assert model.generate(**long, eos_token_id=[]).shape[1] <= 96


def test_an_export_can_be_loaded_where_a_student_is_wanted(folder):
    student = load_student(folder[1])
    assert student.format == folder[2].format


def test_exporting_before_training_says_what_to_run_first(tmp_path):
    with pytest.raises(InputError, match="run `pst train` first"):
        export(Config(output_dir=str(tmp_path / "nothing")))
    assert not (tmp_path / "nothing").exists()


def test_front_matter_is_yaml_between_two_rules(folder):
    text = (folder[1] / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["tags"][-1] == "pst" and "license" not in head


def test_a_student_whose_weight_is_not_finite_is_never_exported(tmp_path):
    """Whole by its digests, as an older version of this program may have left it."""
    tiny = Tiny("pst")
    manifest = tiny.save(tmp_path / "best")
    path = tmp_path / "best" / "model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    weights[name].view(-1)[5] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    files = describe_files(tmp_path / "best", manifest.files)
    write_manifest(tmp_path / "best", replace(manifest, files=files))
    config = Config.model_validate({**tiny.config.model_dump(), "output_dir": str(tmp_path)})
    with pytest.raises(DivergedError, match=rf"export: weight {name} is not finite"):
        export(config)
    assert not (tmp_path / "export").exists()
