"""Scores of a student whose answers are known, and the rules by which an evaluation is read back or done again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluated import LEARNT, make_run
from tiny import ROWS, fitted

from pst_dist.config.loading import load_config
from pst_dist.config.schema import Config
from pst_dist.config.variant import variant_of
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shards import ShardSet
from pst_dist.data.tasks import get_task
from pst_dist.errors import ConfigError, InputError, IntegrityError, StaleError
from pst_dist.evaluation.evaluate import evaluate, finished_evaluation, scoring_settings
from pst_dist.evaluation.scores import chance_of, given_rationales, rows_to_score, score_of
from pst_dist.evaluation.similarity import likeness
from pst_dist.storage.manifest import (
    Manifest,
    describe_files,
    read_json,
    read_lines,
    read_manifest,
    verify_files,
    write_json,
    write_manifest,
)
from pst_dist.student.answer_format import AnswerFormat
from pst_dist.student.contexts import Decoded
from pst_dist.student.generate import predict


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Config, dict]:
    config = make_run(tmp_path_factory.mktemp("run"))
    return config, evaluate(config)


def test_known_answers_give_the_known_accuracy_and_standard_error(done):
    _, results = done
    assert (results["rows"], results["correct"]) == (6, 4)
    assert math.isclose(results["accuracy"], 2 / 3)
    assert math.isclose(results["accuracy_stderr"], math.sqrt((2 / 3) * (1 / 3) / 6))
    assert (results["unparsed"], results["incomplete"]) == (0, 0)
    # A space, the digits and the stop: 3, 4, 5, 3 tokens, and 5 and 3 for the wrong ones.
    assert math.isclose(results["tokens_to_answer"]["mean"], 23 / 6)
    assert results["tokens_to_answer"]["median"] == 3.5
    assert math.isclose(results["majority"], 1 / 6) and results["chance"] is None
    assert (results["arm"], results["task"], results["split"]) == ("pst", "single_eq", "test")
    assert results["training"]["tokens"] == 1234 and results["student"]["step"] == 7


def test_time_to_the_answer_is_measured_one_question_at_a_time(done):
    latency = done[1]["milliseconds_to_answer"]
    assert latency["rows"] == 2 and 0 < latency["median"] <= latency["p90"]
    assert done[1]["rows_per_second"] > 0


def test_every_row_is_written_with_what_was_asked_and_answered(done):
    config, results = done
    directory = Path(config.output_dir) / "eval" / "test"
    rows = read_lines(directory / "samples.jsonl")
    assert [row["id"] for row in rows] == ["t-0", "t-1", "t-2", "t-3", "w-0", "w-1"]
    assert [row["correct"] for row in rows] == [True] * 4 + [False] * 2
    assert rows[4] == {
        "id": "w-0",
        "question": "Say 140",
        "gold": "7",
        "prediction": "140",
        "answer_text": " 140",
        "correct": False,
        "answer_tokens": 5,
        "complete": True,
        "rationale": "it is said",
        "teacher_rationale": "never",
    }
    assert read_json(directory / "results.json") == json.loads(json.dumps(results))
    manifest = read_manifest(directory, "evaluation")
    assert manifest is not None
    verify_files(directory, manifest)


def test_an_evaluation_is_done_once_until_student_rows_or_settings_change(done):
    config, results = done
    path = Path(config.output_dir) / "eval" / "test" / "manifest.json"
    stamp = path.stat().st_mtime_ns
    assert evaluate(config) == json.loads(json.dumps(results))
    assert path.stat().st_mtime_ns == stamp
    fewer = config.model_copy(
        update={"evaluate": config.evaluate.model_copy(update={"max_rows": 2, "latency_rows": 0})}
    )
    again = evaluate(fewer)
    assert again["rows"] == 2 and again["milliseconds_to_answer"] is None
    assert path.stat().st_mtime_ns != stamp
    evaluate(config, rebuild=True)


def test_the_time_of_an_answer_is_measured_no_longer_than_asked_and_says_on_how_many_rows(tmp_path, caplog):
    config = make_run(tmp_path, latency_rows=6, latency_seconds=1e-6, explain_rows=0)
    with caplog.at_level("INFO", logger="pst_dist"):
        first = evaluate(config)["milliseconds_to_answer"]
    assert first["rows"] == 1 and 0 < first["median"] == first["p90"]
    assert "latency: 1 of 6 questions measured in evaluate.latency_seconds=1e-06" in caplog.text
    assert "latency pst 1/6 questions" in caplog.text
    longer = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"latency_seconds": 60.0})})
    assert evaluate(longer)["milliseconds_to_answer"]["rows"] == 6


def test_an_evaluation_made_before_the_new_keys_is_still_valid(done):
    """The settings in the digest of an evaluation with the defaults are those of older versions."""
    config, _ = done
    names = {"split", "max_rows", "batch_size", "max_new_tokens", "rationale", "latency_rows", "explain_rows"}
    assert set(scoring_settings(config)) == names
    other = {"batch_tokens": 512, "latency_seconds": 5.0}
    changed = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=other)})
    assert set(scoring_settings(changed)) == names | set(other)


def test_decoding_in_bfloat16_is_asked_for_on_a_cpu_and_recorded(tmp_path):
    config = make_run(tmp_path, latency_rows=0, explain_rows=0)
    trained = config.model_copy(update={"train": config.train.model_copy(update={"bf16": True})})
    exact = evaluate(trained)
    assert exact["dtype"] == "float32", "on a CPU auto decodes in float32, however it was trained"
    asked = trained.model_copy(update={"evaluate": trained.evaluate.model_copy(update={"bf16": True})})
    coarse = evaluate(asked)
    assert (coarse["dtype"], coarse["correct"]) == ("bfloat16", exact["correct"])
    assert evaluate(trained)["dtype"] == "float32", "another evaluation, not read back"


@pytest.mark.parametrize("key", ["latency_seconds=0", "latency_seconds=-1", "batch_tokens=0", "batch_tokens=1.5"])
def test_limits_of_an_evaluation_that_allow_nothing_are_refused(key):
    with pytest.raises(ConfigError, match=key.partition("=")[0]):
        load_config(None, [f"evaluate.{key}"])


def test_a_damaged_evaluation_is_not_read_back(tmp_path):
    config = make_run(tmp_path, test=LEARNT[:1], explain_rows=0, latency_rows=0)
    evaluate(config)
    results = tmp_path / "eval" / "test" / "results.json"
    results.write_text(results.read_text().replace('"correct": 1', '"correct": 9'))
    with pytest.raises(IntegrityError, match=r"results\.json.*run `pst evaluate` with --rebuild"):
        evaluate(config)
    assert evaluate(config, rebuild=True)["correct"] == 1


def test_the_record_of_another_training_is_not_told_as_this_students(tmp_path):
    config = make_run(tmp_path, test=LEARNT[:1], explain_rows=0, latency_rows=0)
    write_json(tmp_path / "train.json", {**read_json(tmp_path / "train.json"), "fingerprint": "another"})
    assert evaluate(config)["training"] is None


def test_pre_thinking_is_scored_after_its_marker(tmp_path):
    results = evaluate(make_run(tmp_path, "pre_thinking", latency_rows=0))
    assert results["correct"] == 4
    # The rationale's text, " -->", a space, the answer and the stop, in bytes.
    lengths = [1 + len(row.rationales[0]) + 4 + 1 + len(row.answer) + 1 for row in ROWS]
    assert math.isclose(results["tokens_to_answer"]["mean"], (sum(lengths) + lengths[2] + lengths[0]) / 6)


def test_pre_thinking_that_is_given_a_wrong_rationale_answers_by_it_and_an_answer_that_came_first_stays(tmp_path):
    def right(arm: str, rationale: str) -> list[bool]:
        config = make_run(tmp_path / arm, arm, test=LEARNT, latency_rows=0, explain_rows=0, rationale=rationale)
        evaluate(config)
        return [row["correct"] for row in read_lines(tmp_path / arm / "eval" / "test" / "samples.jsonl")]

    assert right("pre_thinking", "teacher") == [True] * 4
    assert not all(right("pre_thinking", "wrong"))
    assert right("post_thinking", "own") == right("post_thinking", "wrong") == [True] * 4


def test_given_rationales_are_each_rows_own_or_another_rows():
    assert given_rationales(LEARNT, wrong=False) == [row.rationales[0] for row in ROWS]
    wrong = given_rationales(LEARNT, wrong=True)
    assert sorted(wrong) == sorted(row.rationales[0] for row in ROWS)
    with pytest.raises(InputError, match="at least two rows"):
        given_rationales(LEARNT[:1], wrong=True)
    with pytest.raises(InputError, match="t-1 has no rationale"):
        given_rationales([LEARNT[0], replace(LEARNT[1], rationales=())], wrong=False)


def test_the_wrong_arm_other_shards_and_missing_pieces_are_refused(tmp_path):
    config = make_run(tmp_path, test=())
    with pytest.raises(InputError, match="no test rows"):
        evaluate(config)
    with pytest.raises(StaleError, match="trained as pst, but the config has arm answer_only"):
        evaluate(config.model_copy(update={"arm": "answer_only"}))
    with pytest.raises(InputError, match="run `pst train` first"):
        evaluate(config.model_copy(update={"output_dir": str(tmp_path / "none")}))
    assert not (tmp_path / "eval").exists()


def test_a_student_of_other_shards_is_stale(tmp_path):
    config = make_run(tmp_path, test=LEARNT[:1], explain_rows=0, latency_rows=0)
    digest = ShardSet.open(tmp_path / "data" / "shards").manifest.digest
    fitted("pst").save(tmp_path / "best", shards=digest)
    assert evaluate(config)["shards"] == digest
    fitted("pst").save(tmp_path / "best", shards="of yesterday")
    with pytest.raises(StaleError, match="different shards"):
        evaluate(config)


@pytest.mark.encoder
def test_rationales_that_are_the_teachers_have_cosine_one_and_others_less(tmp_path):
    from pst_dist.embedding.embed import embed_all

    config = make_run(tmp_path, test=LEARNT, latency_rows=0)
    embed_all(config.embed, ShardSet.open(tmp_path / "data" / "shards"), tmp_path / "data" / "embeddings")
    found = evaluate(config)["rationale_similarity"]
    assert found["rows"] == 4
    assert math.isclose(found["mean"], 1.0, abs_tol=1e-4)
    # Four centred vectors add up to about zero, so the other three average near -1/3.
    assert found["shuffled_mean"] < 0
    rows = read_lines(tmp_path / "eval" / "test" / "samples.jsonl")
    assert all(math.isclose(row["similarity"], 1.0, abs_tol=1e-4) for row in rows)
    gone = config.embed.model_copy(update={"encoder": str(tmp_path / "gone")})
    scores = evaluate(config.model_copy(update={"embed": gone}), rebuild=True)
    assert scores["correct"] == 4 and scores["rationale_similarity"] is None


def test_likeness_compares_each_row_with_its_own_and_with_all_other_teachers():
    student = np.array([[1.0, 0], [0, 2.0], [1.0, 1.0]])
    teacher = np.array([[2.0, 0], [1.0, 0], [0, 3.0]])
    own, others = likeness(student, teacher)
    half = math.sqrt(0.5)
    assert np.allclose(own, [1, 0, half])
    # Row by row against the other two: 1 and 0; 0 and 1; and half twice.
    assert math.isclose(others, (1 + 0 + 0 + 1 + half + half) / 6)


def _format(arm: str) -> AnswerFormat:
    return AnswerFormat.of(Config(arm=arm))


def _decoded(text: str, answer: str) -> Decoded:
    return Decoded(text, answer, 9, True, [0], 0.5)


def test_answer_first_text_is_scored_before_the_stop_and_pre_thinking_by_fine_tune_cots_rule():
    task = get_task("gsm8k")
    assert predict(task, _format("pst"), _decoded(" 12 of 30", " 12 of 30")) == "12"
    for arm in ("pre_thinking", "adaptive"):
        thoughts = (" 3 and 4 --> 7 is it", " 7 is it"), (" 3 and 4 make 7", ""), (" none", "")
        said = [predict(task, _format(arm), replace(_decoded(*thought), thought_first=True)) for thought in thoughts]
        assert said == ["7", "7", None]


def test_unparsed_and_unfinished_answers_are_counted_apart():
    rows = [
        {"correct": True, "prediction": "1", "complete": True, "answer_tokens": 2},
        {"correct": False, "prediction": None, "complete": False, "answer_tokens": 40},
        {"correct": False, "prediction": "3", "complete": False, "answer_tokens": 40},
    ]
    score = score_of(rows)
    assert (score["unparsed"], score["incomplete"], score["correct"]) == (1, 2, 1)
    assert score["tokens_to_answer"]["median"] == 40


def test_results_under_the_old_name_of_a_count_are_still_read(tmp_path):
    same = {
        "task": "svamp",
        "split": "test",
        "rows": 4,
        "accuracy": 0.25,
        "accuracy_stderr": 0.2,
        "tokens_to_answer": {"mean": 3.0},
        "milliseconds_to_answer": None,
    }
    write_json(tmp_path / "results.json", {**same, "parse_failures": 3})
    write_manifest(tmp_path, Manifest("evaluation", "f", describe_files(tmp_path, ["results.json"])))
    assert finished_evaluation(tmp_path) == {**same, "unparsed": 3}


def test_chance_follows_from_the_allowed_answers():
    def choice(*choices: str) -> ReasoningSample:
        return ReasoningSample(id="a", question="q", answer="A", answer_type="choice", choices=choices)

    assert chance_of(get_task("coin_flip"), ROWS) == 0.5
    assert chance_of(get_task("aqua"), ROWS) == 0.2
    assert math.isclose(chance_of(get_task("date_understanding"), [choice("x", "y"), choice(*"abcd")]), 0.375)
    assert chance_of(get_task("svamp"), ROWS) is None


def test_a_part_of_the_rows_is_the_same_part_for_every_arm_whatever_their_order():
    rows = [replace(ROWS[0], id=f"x-{k}") for k in range(50)]
    part = {row.id for row in rows_to_score(rows, 10)}
    assert len(part) == 10 and part == {row.id for row in rows_to_score(rows[::-1], 10)}
    assert part < {row.id for row in rows_to_score(rows, 20)}
    assert rows_to_score(rows, None) == rows


def test_a_control_is_told_from_its_arm():
    def variant(**config) -> list[str]:
        return variant_of(Config.model_validate(config))

    assert variant(arm="pst") == [] and variant(arm="answer_only", loss={"rationale_weight": 0}) == []
    assert variant(arm="pst", loss={"control": "shuffle_embeddings"}) == ["shuffled embeddings"]
    assert variant(arm="pst", loss={"alignment_weight": 0}) == ["no alignment"]
    assert variant(arm="pst", loss={"rationale_weight": 0, "centre": False}) == ["no rationale tokens", "not centred"]
