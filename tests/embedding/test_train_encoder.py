"""`pst encoder train`: what the hard negatives are, that training moves them away, and that a kill loses nothing."""

from __future__ import annotations

import json
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config, EmbedConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.embedding.contrast import changed_texts, triplets
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.train_encoder import EncoderTraining, last_checkpoint, read_wrong, train_encoder
from pst_dist.errors import DataError, EnvironmentFault, InputError, StaleError
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.manifest import sha256_file

COIN = "Ann flips the coin, so it is tails up. The answer is yes."


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A BERT of one layer that reads letters, as sentence-transformers saves it."""
    from sentence_transformers import SentenceTransformer

    folder = tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.printable[:95]]
    letters = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters, **special).save_pretrained(folder / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    settings = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=128, **sizes)
    transformers.BertModel(settings).save_pretrained(folder / "bert")
    SentenceTransformer(str(folder / "bert"), device="cpu").save_pretrained(str(folder / "encoder"))
    return folder / "encoder"


def rows_file(folder: Path, count: int = 48) -> Path:
    path = folder / "rows.jsonl"
    lines = [
        {
            "question": f"What is {n} and {n + 2}?",
            "answer": 2 * n + 2,
            "rationale": f"{n} and {n + 2} make {2 * n + 2}.",
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_for(base: Path, rows: Path, **keys: object) -> Config:
    words = [
        f"embed.encoder={base}",
        "embed.device=cpu",
        f"data.train={rows}",
        "data.validation_size=8",
        "data.answer_type=number",
    ]
    return load_config(None, [*words, *(f"{name}={value}" for name, value in keys.items())])


def test_a_changed_rationale_differs_in_one_place_and_its_last_sentence_comes_first():
    found = changed_texts(COIN, random.Random(0))
    assert "Ann flips the coin, so it is tails up. The answer is no." in found
    assert "Ann flips the coin, so it is heads up. The answer is yes." in found
    assert "Ann flips the coin, so it is not tails up. The answer is yes." in found
    head = "Ann flips the coin, so it is tails up. "
    in_last = [text.startswith(head) for text in found]
    assert in_last == sorted(in_last, reverse=True), "changes of the conclusion come first"
    assert COIN not in found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("text", "one_of"),
    [
        ("12 - 5 = 7.", {"12 - 5 = 4.", "12 - 5 = 5.", "12 - 5 = 6.", "12 - 5 = 8.", "12 - 5 = 9.", "12 - 5 = 10."}),
        ("It is 2.50 dollars.", {"It is 3.50 dollars.", "It is 12.50 dollars.", "It is not 2.50 dollars."}),
        ("The answer is (B).", {"The answer is (A).", "The answer is (C)."}),
        ("So Bob has what Claire had.", {"So Claire has what Claire had.", "So Bob has what Bob had."}),
    ],
)
def test_numbers_options_and_names_change(text, one_of):
    seen = {changed for seed in range(20) for changed in changed_texts(text, random.Random(seed))}
    assert seen & one_of
    assert text not in seen


def test_a_text_without_anything_to_change_gives_nothing():
    assert changed_texts("hm", random.Random(0)) == []


def test_positives_are_other_rationales_and_the_teachers_wrong_samples_come_first():
    one = ReasoningSample(id="a", question="What is 2 and 3?", answer="5", rationales=("2 and 3 is 5.", "3 + 2 = 5."))
    two = ReasoningSample(id="b", question="Say hm.", answer="hm", rationales=("hm",))
    three = ReasoningSample(id="c", question="What is 1 and 1?", answer="2", rationales=("1 and 1 is 2.",))
    made = triplets([one, two, three], {"what is 2 and 3": ["2 and 3 is 6.", "3 + 2 = 5."]}, negatives=2, seed=0)
    first, second, third = made.rows
    assert (first.anchor, first.positive, first.negatives[0]) == ("2 and 3 is 5.", "3 + 2 = 5.", "2 and 3 is 6.")
    assert (second.anchor, second.positive, second.negatives[0]) == ("3 + 2 = 5.", "2 and 3 is 5.", "2 and 3 is 6.")
    assert third.positive == third.anchor
    assert not set(first.negatives) & set(one.rationales), "a right rationale is no negative"
    assert (made.paired, made.from_teacher, made.without_negative) == (2, 2, 1)
    assert made == triplets(
        [one, two, three], {"what is 2 and 3": ["2 and 3 is 6.", "3 + 2 = 5."]}, negatives=2, seed=0
    )


def test_wrong_rationales_are_read_in_both_forms(tmp_path):
    taught = tmp_path / "dropped.jsonl"
    reply = {"finish": "stop", "text": " It is 6. ", "thought": None}
    lines = [
        {"question": "What is 2 and 3?", "verdict": "wrong", "replies": [reply, {"text": "6"}]},
        {"question": "What is 2 and 3?", "verdict": "duplicate", "replies": [reply | {"text": "It is 5."}]},
    ]
    taught.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = tmp_path / "wrong.jsonl"
    plain.write_text(json.dumps({"question": "What is  2 and 3", "rationale": "It is 7."}) + "\n")
    assert read_wrong([taught, plain]) == {"what is 2 and 3": ["It is 6.", "It is 7."]}
    plain.write_text('{"text": "no question"}\n')
    with pytest.raises(InputError, match="no line is a JSON object with a question and a wrong rationale"):
        read_wrong([plain])
    with pytest.raises(InputError, match="no such file"):
        read_wrong([tmp_path / "absent.jsonl"])


def test_training_moves_a_rationale_away_from_one_with_another_end(base, tmp_path):
    config = config_for(base, rows_file(tmp_path))
    settings = EncoderTraining(output=tmp_path / "trained", epochs=20, batch_size=16, learning_rate=1e-2)
    manifest = train_encoder(config, settings)
    before, after = manifest.extra["before"], manifest.extra["after"]
    assert before["rationales"] == 8, "measured on validation rows only"
    assert after["to_negative"] < before["to_negative"] - 0.02
    assert manifest.extra["steps"] == 20 * 3
    # Any program reads the folder, and embed.encoder gives the same vectors.
    from sentence_transformers import SentenceTransformer

    stock = SentenceTransformer(str(settings.output), device="cpu").encode([COIN], normalize_embeddings=True)
    ours = TextEncoder(EmbedConfig(encoder=str(settings.output), device="cpu")).encode([COIN])
    assert abs(stock - ours).max() < 1e-6
    assert "rationales" in (settings.output / "README.md").read_text()
    assert not (tmp_path / "trained.training").exists()

    inode = (settings.output / "model.safetensors").stat().st_ino
    assert train_encoder(config, settings) == manifest
    assert (settings.output / "model.safetensors").stat().st_ino == inode, "nothing to do"
    other = EncoderTraining(output=settings.output, epochs=1)
    with pytest.raises(StaleError, match="trained from other rows, settings or weights"):
        train_encoder(config, other)
    assert train_encoder(config, other, rebuild=True).extra["epochs"] == 1


def test_what_is_no_training_is_refused(base, tmp_path, monkeypatch):
    rows = rows_file(tmp_path, count=10)
    with pytest.raises(DataError, match="2 rationales can be used; training an encoder needs at least 8"):
        train_encoder(config_for(base, rows), EncoderTraining(output=tmp_path / "few"))
    with pytest.raises(InputError, match="is a causal language model, which this command cannot train"):
        train_encoder(config_for(base, rows, **{"embed.layer": 1}), EncoderTraining(output=tmp_path / "causal"))
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(folder)
    for place in (folder, Path(".")):
        with pytest.raises(InputError, match=r"would be replaced, but 'thesis\.txt' in it was not written by pst"):
            train_encoder(config_for(base, rows), EncoderTraining(output=place))  # before it sees too few rows


def test_a_batch_that_does_not_fit_in_memory_names_the_option(base, tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformerTrainer

    def too_large(*arguments, **rest):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    config = config_for(base, rows_file(tmp_path))
    settings = EncoderTraining(output=tmp_path / "mine", epochs=1)
    with monkeypatch.context() as patched:
        patched.setattr(SentenceTransformerTrainer, "training_step", too_large)
        with pytest.raises(EnvironmentFault, match=r"Tried to allocate 2.*use a smaller --batch-size than 32"):
            train_encoder(config, settings)
    assert not (tmp_path / "mine").exists()
    train_encoder(config, EncoderTraining(output=tmp_path / "mine", epochs=1, batch_size=16))
    assert Artefact(tmp_path / "mine", "encoder").is_intact()


def test_rationales_in_which_nothing_can_be_changed_are_counted(base, tmp_path):
    rows = tmp_path / "letters.jsonl"
    lines = [
        {"question": f"Join {n} of rkzux ozom", "answer": "xm", "rationale": "rkzux ends in x."} for n in range(12)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_for(base, rows, **{"data.answer_type": "text", "data.validation_size": 0})
    with pytest.raises(DataError, match="0 rationales can be used, and 12 have no number, option, name, "):
        train_encoder(config, EncoderTraining(output=tmp_path / "none"))


def test_a_killed_training_continues_and_ends_with_the_same_weights(base, tmp_path):
    rows = rows_file(tmp_path)
    config = config_for(base, rows)
    whole = EncoderTraining(output=tmp_path / "whole", epochs=30, batch_size=8)
    train_encoder(config, whole)

    words = [
        "encoder",
        "train",
        str(tmp_path / "my.yaml"),
        "-o",
        str(tmp_path / "cut"),
        "--epochs=30",
        "--batch-size=8",
    ]
    (tmp_path / "my.yaml").write_text(
        f"embed: {{encoder: {base}, device: cpu}}\ndata: {{train: {rows}, validation_size: 8, answer_type: number}}\n"
    )
    process = subprocess.Popen([sys.executable, "-m", "pst_dist", *words], stderr=subprocess.PIPE, text=True)
    checkpoints = tmp_path / "cut.training" / "checkpoints"
    until = time.monotonic() + 400
    while not any(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < until, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut").exists(), "the training was killed before its end"
    newest = last_checkpoint(checkpoints)
    assert newest is not None
    torn = checkpoints / "checkpoint-9999"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"epoch": 3')

    ended = subprocess.run([sys.executable, "-m", "pst_dist", *words], capture_output=True, text=True, check=True)
    assert f"continuing from {newest.name}" in ended.stderr
    assert "the rationale with another conclusion" in ended.stdout
    weights = [sha256_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert Artefact(tmp_path / "cut", "encoder").is_intact()
