"""The adaptive arm: both orders in one student, a threshold chosen by a rule, and answers that follow from it."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest
from evaluated import LEARNT, WRONG, make_run
from tiny import ROWS, Tiny, fitted

from pst_dist.arms import Segment
from pst_dist.cli.main import run_verb
from pst_dist.errors import ConfigError, InputError
from pst_dist.evaluation.adaptive import ALWAYS, BothWays, choose_threshold
from pst_dist.evaluation.evaluate import evaluate
from pst_dist.publish.export import export
from pst_dist.storage.manifest import read_json
from pst_dist.student.ask import timed_answer
from pst_dist.student.generate import decode_answers, decode_rationales
from pst_dist.student.layout import layout_for
from pst_dist.student.saved import load_student

QUESTIONS = [row.question for row in ROWS]
VALIDATION = tuple(replace(row, id=f"v-{k}") for k, row in enumerate(ROWS))


def both(probability: list[float], at_once: list[int], thought: list[int]) -> BothWays:
    """Rows that cost 2 tokens at once and 10 after thinking."""
    right = np.array([at_once, thought], dtype=bool).T
    return BothWays(np.array(probability), right, np.array([[2, 10]] * len(probability)))


def test_the_threshold_parts_the_rows_that_thinking_helps_from_the_others():
    rows = both([0.9, 0.2, 0.8, 0.3], at_once=[1, 0, 1, 0], thought=[1, 1, 1, 1])
    chosen = choose_threshold(rows)
    assert chosen == pytest.approx(0.55)
    assert rows.at(chosen) == {
        "think_below": chosen,
        "thinking": 0.5,
        "accuracy": 1.0,
        "accuracy_stderr": 0.0,
        "tokens": 2 + 10 / 2,
    }


def test_what_thinking_gains_must_be_more_than_a_standard_error():
    # 64 and 68 of 100 right: a standard error is 4.7 points, and thinking costs five times the tokens.
    unsure = [k / 100 for k in range(100)]
    nearly = both(unsure, at_once=[0] * 36 + [1] * 64, thought=[1] * 4 + [0] * 32 + [1] * 64)
    assert choose_threshold(nearly) == 0.0
    # 64 and 94: the fewest tokens within a standard error of 94 (2.4 points) are those of 28 rows that think.
    much = both(unsure, at_once=[0] * 36 + [1] * 64, thought=[1] * 30 + [0] * 6 + [1] * 64)
    assert much.at(choose_threshold(much))["thinking"] == pytest.approx(0.28)


def test_a_student_that_is_wrong_at_once_and_sure_of_it_always_thinks():
    rows = both([1.0] * 4, at_once=[0] * 4, thought=[1] * 4)
    assert choose_threshold(rows) == ALWAYS and rows.at(ALWAYS)["thinking"] == 1.0


def test_the_trade_off_runs_from_never_to_always():
    rows = both([0.1, 0.5, 0.5, 0.7, 0.9], at_once=[0, 1, 0, 1, 1], thought=[1, 1, 1, 0, 1])
    line = rows.trade_off()
    assert [point["thinking"] for point in line] == [0.0, 0.2, 0.6, 0.8, 1.0]
    assert [point["accuracy"] for point in line] == [0.6, 0.8, 1.0, 0.8, 0.8]
    assert [point["tokens"] for point in line] == [2, 4, 8, 10, 12]


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_each_sample_is_trained_on_in_both_orders(architecture):
    tiny = Tiny("adaptive", architecture)
    answer, semantic, rationale = Segment.ANSWER, Segment.SEMANTIC, Segment.RATIONALE
    at_once, thought = tiny.layout.sequences(ROWS[1])
    assert list(dict.fromkeys(at_once.segments)) == [answer, semantic, rationale]
    assert list(dict.fromkeys(thought.segments)) == [rationale, answer]
    told = [tiny.tokenizer.decode(one.prompt_ids, skip_special_tokens=True) for one in (at_once, thought)]
    assert told[1] == told[0].replace("What is 10", "think: What is 10") != told[0]
    assert thought.target_ids[-1] == at_once.target_ids[len(" 17")] == tiny.layout.stop_id
    batch = tiny.batch()
    assert len(batch.spans) == len(ROWS)  # the semantic token stands in one of the two
    assert len(batch.input_ids) == 2 * len(ROWS)


def test_it_cannot_learn_to_think_without_a_loss_on_the_rationale():
    tiny = Tiny("adaptive")
    config = tiny.config.model_copy(update={"loss": tiny.config.loss.model_copy(update={"rationale_weight": 0})})
    with pytest.raises(ConfigError, match="rationale"):
        layout_for(config, tiny.tokenizer, is_encoder_decoder=False)


@pytest.mark.parametrize("layout", [{}, {"semantic_position": "before"}], ids=["after", "before"])
@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_one_student_answers_at_once_and_after_thinking(architecture, layout):
    tiny = fitted("adaptive", architecture, **layout)
    ask = (tiny.model, tiny.tokenizer, tiny.format, QUESTIONS)
    settings = {"batch_size": 3, "max_new_tokens": 60}
    at_once, thought = decode_answers(*ask, **settings), decode_answers(*ask, other=True, **settings)
    assert [answer.answer_text.strip() for answer in at_once] == [row.answer for row in ROWS]
    assert [answer.answer_text.strip() for answer in thought] == [row.answer for row in ROWS]
    assert not any(answer.thought_first for answer in at_once) and all(answer.thought_first for answer in thought)
    assert all(0.5 < answer.probability <= 1 for answer in at_once)
    teachers = [row.rationales[0] for row in ROWS]
    # After the answer, before it, and in a batch that holds both.
    assert decode_rationales(*ask, at_once, **settings) == teachers
    assert decode_rationales(*ask, thought, **settings) == teachers
    assert decode_rationales(*ask, [*at_once[:2], *thought[2:]], **settings) == teachers


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A run of arm adaptive with validation rows, scored, and what was said of it."""
    config = make_run(tmp_path_factory.mktemp("adaptive"), "adaptive", validation=VALIDATION)
    return config, evaluate(config)


def test_an_evaluation_tells_both_ways_and_scores_the_chosen_one(scored):
    _, results = scored
    adaptive = results["adaptive"]
    # All four validation rows are right at once, so nothing is worth thinking for.
    assert (adaptive["think_below"], adaptive["chosen_on"], adaptive["thinking"]) == (0.0, "validation", 0.0)
    assert results["accuracy"] == adaptive["accuracy"] == adaptive["at_once"]["accuracy"] == 4 / 6
    assert results["tokens_to_answer"]["mean"] == adaptive["tokens"] == adaptive["at_once"]["tokens"]
    assert adaptive["always_thinking"]["tokens"] > 3 * adaptive["tokens"]
    assert adaptive["trade_off"][0] == adaptive["at_once"] and adaptive["trade_off"][-1] == adaptive["always_thinking"]


def test_a_threshold_that_is_given_is_used_and_pays_for_both_answers(tmp_path):
    config = make_run(tmp_path, "adaptive", think_below=ALWAYS)
    results = evaluate(config)
    assert results["adaptive"]["chosen_on"] == "config" and results["adaptive"]["thinking"] == 1.0
    always, at_once = results["adaptive"]["always_thinking"], results["adaptive"]["at_once"]
    assert results["tokens_to_answer"]["mean"] == pytest.approx(always["tokens"])
    assert always["tokens"] > at_once["tokens"] + 10
    student = load_student(tmp_path / "best", "cpu")
    questions = [row.question for row in (*LEARNT, *WRONG)]
    answers = [timed_answer(student, question, max_new_tokens=40, think_below=ALWAYS)[0] for question in questions]
    assert sum(answer.answer_tokens for answer in answers) / 6 == pytest.approx(always["tokens"])


def test_without_validation_rows_there_is_nothing_to_choose_on(tmp_path):
    with pytest.raises(InputError, match="no validation rows") as caught:
        evaluate(make_run(tmp_path, "adaptive"))
    assert "evaluate.think_below" in caught.value.remedy


def test_another_threshold_is_another_evaluation_and_says_nothing_to_other_arms(tmp_path, scored):
    config, _ = scored
    changed = config.evaluate.model_copy(update={"think_below": ALWAYS})
    assert evaluate(config.model_copy(update={"evaluate": changed}))["adaptive"]["thinking"] == 1.0
    assert evaluate(config) == evaluate(config)  # and back
    plain = make_run(tmp_path, "pst")
    evaluate(plain)
    before = read_json(tmp_path / "eval" / "test" / "manifest.json")
    evaluate(plain.model_copy(update={"evaluate": plain.evaluate.model_copy(update={"think_below": 0.5})}))
    assert read_json(tmp_path / "eval" / "test" / "manifest.json") == before


def test_the_export_carries_the_threshold_and_its_card_thinks_as_we_do(tmp_path):
    # A probability is never over 1, so that every question is thought about.
    config = make_run(tmp_path, "adaptive", think_below=1.5)
    evaluate(config)
    folder = export(config)
    assert read_json(folder / "pst.json")["think_below"] == 1.5
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "## Thinking first when unsure" in card
    names: dict = {}
    printed = []
    for block in [part.split("```")[0] for part in card.split("```python")[1:]]:
        code = block.replace('"path/to/this/folder"', repr(str(folder)))
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(code.replace('question = "…"', f"question = {QUESTIONS[1]!r}"), names)
        printed.append(output.getvalue().strip())
    assert printed == [ROWS[1].answer, ROWS[1].rationales[0], ROWS[1].answer]
    assert names["rationale"] == ROWS[1].rationales[0]
    tiny = fitted("adaptive")
    (ours,) = decode_answers(tiny.model, tiny.tokenizer, tiny.format, QUESTIONS[1:2], batch_size=1, max_new_tokens=40)
    assert names["probability"] == pytest.approx(ours.probability, rel=1e-4)


def test_a_question_is_thought_about_when_the_command_says_so(scored, capsys, tmp_path):
    run = scored[0].output_dir
    assert run_verb(["answer", run, QUESTIONS[1], "--explain"]) == 0
    at_once = capsys.readouterr()
    assert run_verb(["answer", run, QUESTIONS[1], "--explain", "--think-below", "2"]) == 0
    thought = capsys.readouterr()
    assert at_once.out == thought.out == f"17\nbecause: {ROWS[1].rationales[0]}\n"
    assert "thought first" in thought.err and "thought first" not in at_once.err
    plain = make_run(tmp_path, "pst")
    assert run_verb(["answer", plain.output_dir, QUESTIONS[1], "--think-below", "2"]) != 0
    assert "arm adaptive" in capsys.readouterr().err
