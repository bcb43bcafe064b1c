"""A loaded student: one question and many, conversations, threads, and what cannot be asked."""

import sys
import threading

import pytest
from talking import TALKS, messages
from tiny import fitted

import pst_dist
from pst_dist.errors import EnvironmentFault, InputError, IntegrityError


def test_without_a_student_the_remedy_is_named(tmp_path):
    with pytest.raises(InputError, match="pst train"):
        pst_dist.load_student(tmp_path / "none")
    with pytest.raises(InputError, match="path of a student's folder, got list"):
        pst_dist.load_student([tmp_path])
    for arm in ("pst", "prefix"):
        (tmp_path / arm / "best").mkdir(parents=True)
    with pytest.raises(InputError, match="name one: prefix, pst"):
        pst_dist.load_student(tmp_path)
    fitted("pst").save(tmp_path / "run" / "best")
    weights = tmp_path / "run" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(IntegrityError):
        pst_dist.load_student(tmp_path / "run")


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students") / "pst"
    fitted("pst").save(folder / "best")
    return pst_dist.load_student(folder, device="cpu")


QUESTIONS = ["Say 140", "2 + 3?", "9 - 9 in all?", "What is 10 + 7?", " 2 + 3? "]


def test_a_student_answers_one_question(student):
    answer = student.ask("What is 10 + 7?", explain=True)
    assert (answer.text, answer.rationale, answer.complete) == ("17", "ten, seven", True)
    assert 0.5 < answer.probability <= 1 and answer.seconds > 0 and answer.tokens == 4 and not answer.thought_first
    assert student.ask("Say 140").rationale is None
    assert repr(student) == f"<Student pst in {student.directory} on cpu>" and student.arm == "pst"


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_many_questions_are_answered_in_order_as_one_by_one(student, batch_size):
    many = student.ask_many((question for question in QUESTIONS), explain=True, batch_size=batch_size)
    assert [answer.text for answer in many] == ["140", "5", "0", "17", "5"]
    assert [answer.rationale for answer in many][:2] == ["it is said", "two and three"]
    for question, answer in zip(QUESTIONS, many, strict=True):
        one = student.ask(question)
        assert (answer.text, answer.tokens, answer.complete) == (one.text, one.tokens, one.complete)
        assert answer.probability == pytest.approx(one.probability, rel=1e-4)
    assert student.ask_many([]) == []


def test_an_adaptive_student_thinks_first_where_it_is_unsure(tmp_path):
    fitted("adaptive").save(tmp_path / "best")
    adaptive = pst_dist.load_student(tmp_path, device="cpu")
    at_once = adaptive.ask_many(QUESTIONS, think_below=0)
    thought = adaptive.ask_many(QUESTIONS, think_below=2, batch_size=2)
    assert not any(answer.thought_first for answer in at_once) and all(answer.thought_first for answer in thought)
    assert [answer.text for answer in thought] == ["140", "5", "0", "17", "5"]
    assert all(late.tokens > early.tokens for late, early in zip(thought, at_once, strict=True))
    between = sorted(answer.probability for answer in at_once[:4])
    some = adaptive.ask_many(QUESTIONS, think_below=(between[1] + between[2]) / 2)
    assert [answer.thought_first for answer in some[:4]].count(True) == 2
    for question, answer in zip(QUESTIONS, thought, strict=True):
        assert adaptive.ask(question, think_below=2).tokens == answer.tokens


def test_conversations_are_asked_as_turns(talking_run):
    talker = pst_dist.load_student(talking_run.output_dir, device="cpu")
    asked = [messages(sample) if sample.turns else sample.question for sample in TALKS]
    assert [talker.ask(one).text for one in asked] == ["140", "41", "141", "14"]
    assert [answer.text for answer in talker.ask_many(asked, explain=True)] == ["140", "41", "141", "14"]
    for wrong, words in (
        ([*asked[1], asked[1][1]], "the question cannot be asked: .*in alternation"),
        ([{"role": "user"}], "the question is NoneType, not text"),
        (["Say 140"], "the question is a list, expected a list of objects"),
        ([], "the question is list, not text"),
    ):
        with pytest.raises(InputError, match=words):
            talker.ask(wrong)
    with pytest.raises(InputError, match="questions is one conversation"):
        talker.ask_many(asked[1])
    with pytest.raises(InputError, match=r"question 2 of 2\[0\] has the unknown role 'critic'"):
        talker.ask_many(["Say 140", [{"role": "critic", "content": "no"}]])


def test_a_student_without_turns_is_asked_a_conversation_as_one_text(student):
    turns = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
    turns.append({"role": "user", "content": "Say 140"})
    one = student.ask("User: 2 + 3?\nAssistant: 5\nUser: Say 140")
    assert student.ask(turns).text == one.text and student.ask(turns).probability == pytest.approx(one.probability)


@pytest.mark.parametrize(
    ("questions", "words"),
    [
        (["2 + 3?", " "], "question 2 of 2 is empty"),
        (["2 + 3?", None], "question 2 of 2 is NoneType"),
        (["2 + 3?", "x" * 300], "question 2 of 2 is too long: it fills all 96 positions"),
        ([""], "the question is empty"),
        ("2 + 3?", "questions is one string"),
    ],
)
def test_a_question_that_cannot_be_asked_is_named(student, questions, words):
    with pytest.raises(InputError, match=words):
        student.ask_many(questions)


def test_settings_of_a_question_are_checked(student):
    with pytest.raises(InputError, match="think_below applies to the arm adaptive only"):
        student.ask("2 + 3?", think_below=0.5)
    with pytest.raises(InputError, match="batch_size is 0"):
        student.ask_many(["2 + 3?"], batch_size=0)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        student.ask("2 + 3?", max_new_tokens=0)


def test_threads_take_turns_with_one_student(student):
    answers = [None] * 4

    def ask(place):
        answers[place] = student.ask(QUESTIONS[place]).text

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == ["140", "5", "0", "17"]


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    fitted("pst").save(tmp_path / "best")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentFault, match=r"transformers is not installed; pip install 'pst-dist\[train\]'"):
        pst_dist.load_student(tmp_path)
