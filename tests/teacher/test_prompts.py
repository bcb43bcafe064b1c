"""What a teacher is asked, and our worked examples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pst_dist.data.tasks import TASKS, get_task
from pst_dist.errors import ConfigError
from pst_dist.teacher.examples import own_examples
from pst_dist.teacher.messages import as_text
from pst_dist.teacher.prompts import make_prompt
from pst_dist.teacher.questions import Question

DATA = Path(__file__).parents[3] / "shared" / "data" / "teacher_completions_davinci002"
TWELVE = [name for name in TASKS if name not in ("arithmetic", "proportion")]
QUESTION = Question(id="q", text="How many are {answer} and 4?", gold="7", choices=())


@pytest.mark.data
@pytest.mark.parametrize("task", ["svamp", "strategy_qa", "last_letter_concatenation", "tracking_shuffled_objects"])
def test_zero_shot_is_what_fine_tune_cot_asked(task):
    file = DATA / f"D_{task}.json"
    if not file.is_file():
        pytest.skip("needs the public datasets")
    prompt = make_prompt("zero_shot", get_task(task), (), 1)
    for entries in list(json.loads(file.read_text())["data"].values())[:50]:
        asked = entries[0]
        question = Question(id="q", text=asked["question"], gold=None)
        assert as_text(prompt.first(question, False)) == asked["reasoning_prompt"]
        second = as_text(prompt.second(question, asked["reasoning_completion"], False))
        assert second.split() == asked["prompt"].split()


def test_zero_shot_as_a_conversation():
    prompt = make_prompt("zero_shot", get_task("strategy_qa"), (), 1)
    assert prompt.first(QUESTION, True) == (("user", f"{QUESTION.text}\n\nLet's think step by step."),)
    turns = prompt.second(QUESTION, " Because. ", True)
    assert [role for role, _ in turns] == ["user", "assistant", "user"] and turns[1] == ("assistant", "Because.")
    assert "yes or no" in turns[2][1]


def test_few_shot_shows_the_examples_but_never_the_question_itself():
    examples = [
        Question(id=f"e-{n}", text=f"What is {n} + 1?", gold=str(n + 1), rationales=(f"{n} and one.",))
        for n in range(4)
    ]
    prompt = make_prompt("few_shot", get_task("svamp"), examples, 2)
    turns = prompt.first(examples[0], True)
    assert [text for role, text in turns if role == "user"] == [
        "What is 1 + 1?",
        "What is 2 + 1?",
        "What is 0 + 1?",
    ]
    assert ("assistant", "1 and one. The answer is 2.") in turns
    text = as_text(prompt.first(QUESTION, False))
    assert text.startswith("Q: What is 0 + 1?\nA: 0 and one. The answer is 1.\nQ: ") and text.endswith(" and 4?\nA:")


def test_explain_tells_the_gold_answer_with_its_option():
    prompt = make_prompt("explain", get_task("commonsense_qa"), (), 1)
    choice = Question(id="q", text="Which?", gold="B", choices=("cat", "dog"))
    assert "The answer is (B) dog." in prompt.first(choice, True)[0][1]
    assert prompt.shows_answer and prompt.second(choice, "x", True) is None


def test_a_template_of_the_user(tmp_path):
    plain = tmp_path / "mine.txt"
    plain.write_text("Solve: {question}\nuse \\frac{a}{b}\n")
    prompt = make_prompt(str(plain), get_task("svamp"), (), 1)
    assert prompt.name == "mine" and not prompt.shows_answer
    # Braces that are not ours stay, and so do braces in the question.
    assert prompt.first(QUESTION, True) == (("user", "Solve: How many are {answer} and 4?\nuse \\frac{a}{b}"),)
    full = tmp_path / "full.yaml"
    full.write_text("system: Be brief.\nprompt: '{question} ({answer})'\nanswer_prompt: So?\n")
    prompt = make_prompt(str(full), get_task("svamp"), (), 1)
    assert prompt.shows_answer
    assert prompt.second(QUESTION, "r", True) == (
        ("system", "Be brief."),
        ("user", "How many are {answer} and 4? (7)"),
        ("assistant", "r"),
        ("user", "So?"),
    )


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.txt", "Solve it", "{question}"),
        ("a.yaml", "prompt: [1]", "prompt"),
        ("a.yaml", "prompt: '{question}'\nsytem: x", "sytem"),
        ("a.yaml", "prompt: '{question}", "YAML"),
        ("zero_shot.txt", "{question}", "another name"),
    ],
)
def test_a_template_that_is_none_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        make_prompt(str(tmp_path / name), get_task("svamp"), (), 1)
    assert words in str(caught.value) and name in str(caught.value)


def test_an_unknown_prompt_is_refused():
    with pytest.raises(ConfigError, match="zero_shot, few_shot, explain"):
        make_prompt("zeroshot", get_task("svamp"), (), 1)


@pytest.mark.parametrize("name", TWELVE)
def test_our_examples_have_right_answers(name):
    task = get_task(name)
    examples = own_examples(task)
    assert len(examples) == 3 and all(one.source.endswith(f"#{name}") for one in examples)
    for one in examples:
        assert task.gold(one.gold) == one.gold
        if task.choice_letters:
            options = dict(re.findall(r"\(([A-F])\) ([^,.]+)", one.text))
            assert list(options) == list(task.choice_letters), "as many options as the task has"
            assert f"choice {one.gold}." in one.rationales[0]
        if task.answer_type == "number":
            assert re.search(rf"(?<![\d.]){re.escape(one.gold)}(?![\d])", one.rationales[0])
        for left, right in re.findall(r"((?:\d[\d.]*\s[-+*/]\s)+\d[\d.]*) = (\d[\d.]*\d|\d)", one.rationales[0]):
            if "days" not in left:
                assert eval(left) == pytest.approx(float(right)), one.rationales[0]
        if name == "last_letter_concatenation":
            words = re.search(r'"(.+)"', one.text).group(1).split()
            assert "".join(word[-1] for word in words) == one.gold
        if name == "coin_flip":
            flips = len(re.findall(r"\w+ flips the coin", one.text))
            assert one.gold == ("no" if flips % 2 else "yes")


def test_a_task_without_examples_says_so():
    with pytest.raises(ConfigError, match="--examples"):
        own_examples(get_task(None, "date"))
