"""Replies that mix reasoning and answer: the last explicit mark wins, and what cannot be told is refused."""

from __future__ import annotations

import json

import pytest

from pst_dist.config.schema import Config
from pst_dist.data.sources import load_data, survey
from pst_dist.data.sources.column_guess import choose_columns, guess_columns
from pst_dist.data.sources.replies import has_mark, split_reply
from pst_dist.data.sources.rows import RowError
from pst_dist.errors import DataError


@pytest.mark.parametrize(
    ("reply", "rationale", "answer"),
    [
        # the last mark wins
        ("The answer is C. Wait... The answer is D", "The answer is C. Wait...", "D"),
        ("It is \\boxed{3}. No.\nThe answer is 4.", "It is \\boxed{3}. No.", "4"),
        ("The answer is 18.\n#### 18", "The answer is 18.", "18"),
        # boxes
        ("So $x = \\boxed{\\frac{1}{\\sqrt{2}}}$.", "So $x = \\frac{1}{\\sqrt{2}}$", "\\frac{1}{\\sqrt{2}}"),
        ("So\n\\[\nx = \\boxed{3}.\n\\]\nHence.", "So\n\\[\nx = 3.\n\\]", "3"),
        ("So \\( 1 + 2 = \\boxed{3} \\) apples.", "So \\( 1 + 2 = 3 \\)", "3"),
        ("$$\\begin{align*} x &= \\boxed{3} \\end{align*}$$", "$$\\begin{align*} x &= 3 \\end{align*}$$", "3"),
        ("At \\$5 it is \\boxed{3}$.", "At \\$5 it is 3", "3"),
        ("Add.\n\n\\[\n\\boxed{\\text{B}}\n\\]", "Add.", "B"),
        ("Add.\n\n**Final Answer**\n\n$$\\boxed{7}$$", "Add.", "7"),
        ("The set is $\\boxed{\\{1, 2\\}}$", "The set is \\{1, 2\\}", "\\{1, 2\\}"),
        ("Add.\nThe final answer is: $\\boxed{7}$.", "Add.", "7"),
        ("Add.\n\\boxed 7", "Add.", "7"),
        # R1: a thought, then a working, then a marked answer
        ("<think>Hm.</think>\n\n3 + 4 = 7.\n\n**Answer:** $\\boxed{7}$", "Hm.\n\n3 + 4 = 7.", "7"),
        ("Hm, the answer is 5?</think>\nAdd.\nFinal answer: 6", "Hm, the answer is 5?\n\nAdd.", "6"),
        ("<think>\n\n</think>\n\nAdd.\n\\boxed{7}", "Add.", "7"),
        ("<thinking>a</thinking>7", "a", "7"),
        (
            "<|begin_of_thought|>a<|end_of_thought|>\n<|begin_of_solution|>b\n\\boxed{7}<|end_of_solution|>",
            "a\n\nb",
            "7",
        ),
        ("<THINK>a</Think>Add.\nThe answer is 7", "a\n\nAdd.", "7"),
        ("[THINK]a[/THINK]Add. \\boxed{7}", "a\n\nAdd. 7", "7"),
        ("<think>a</think><scratchpad>b</scratchpad>7", "a\n\nb", "7"),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>Answer: 7<|return|>",
            "a",
            "7",
        ),
        ("I said 7, but the answer is actually 8.", "I said 7, but", "8"),
        # headings are no answers
        (
            "#### Step 1\n3 cats.\n#### Step 2\n3 x 4 = 12\n#### 12",
            "#### Step 1\n3 cats.\n#### Step 2\n3 x 4 = 12",
            "12",
        ),
        ("#### Step 1\n3 x 4\n\nFinal result: \\boxed{12}", "#### Step 1\n3 x 4", "12"),
        ("A --> B, so 2.\n--> 2 END", "A --> B, so 2.", "2"),
        # labels and tags
        ("44 + 45 = 89The answer is 89", "44 + 45 = 89", "89"),
        ("Add.\nFinal answer: 90", "Add.", "90"),
        ("Add. <answer>97</answer>", "Add.", "97"),
        ("Add. <answer>\\boxed{97}</answer>", "Add.", "97"),
        ("Add. <ANSWER>97</ANSWER>", "Add.", "97"),
        ("Add.\n<final_answer>97</final_answer>", "Add.", "97"),
        ("Add. <answer>So the answer is 97.</answer>", "Add.", "97"),
        ("<answer>\n#### 97\n</answer>", None, "97"),
        ("Add.\nAnswer: 91", "Add.", "91"),
        ("Add.\n## Answer\n92", "Add.", "92"),
        ("Add.\n**The correct answer is (C)**.", "Add.", "(C)"),
        # where the answer ends
        ("Add.\nThe answer is 5. I hope this helps!", "Add.", "5"),
        ("Add.\nThe answer is 5 because 2 + 3 = 5.", "Add.", "5"),
        ("Add.\nThe answer is 5, because 2 + 3 = 5.", "Add.", "5"),
        ("Add.\nThe answer is 5 \u2013 because 2 + 3 = 5.", "Add.", "5"),
        ("Add.\nThe answer is 3.14.", "Add.", "3.14"),
        ("First \\boxed{3}. Then I saw my slip:\n\\boxed{5}", "First \\boxed{3}. Then I saw my slip:", "5"),
        ("It is \\boxed{5}.\n\n\\boxed{5}", "It is \\boxed{5}.", "5"),
        ("Question: 2 + 3?\nAdd.\nThe answer is 5.\n\nQuestion: 2 + 4?", "Question: 2 + 3?\nAdd.", "5"),
        ("Look.\nThe answer is St. Louis. It is a city.", "Look.", "St. Louis"),
        ("Look.\nThe answer is J. K. Rowling.", "Look.", "J. K. Rowling"),
        ("Look.\nThe answer is B. dog.", "Look.", "B. dog"),
        ("Look.\nThe answer is B. It barks.", "Look.", "B"),
        ("Add.\nThe answer is -$5.", "Add.", "-$5"),
    ],
)
def test_the_last_mark_gives_the_answer_and_what_precedes_it_is_the_rationale(reply, rationale, answer):
    assert tuple(split_reply(reply)) == (rationale, answer)


@pytest.mark.parametrize(
    ("reply", "code", "what"),
    [
        ("<think>First guess: the answer is 17", "cut", "a thought is cut off: <think> without </think>"),
        ("<think>a</think>b<think>the answer is 3", "cut", "a thought is cut off"),
        ("<|begin_of_thought|>the answer is 3", "cut", "a thought is cut off"),
        ("<THINK>so the answer is 3", "cut", "a thought is cut off: <think> without </think>"),
        ("[THINK]so the answer is 3", "cut", "a thought is cut off"),
        ("\u25c1think\u25b7so the answer is 3", "cut", "a thought is cut off"),
        ("<think>a</think><reasoning>so the answer is 7", "cut", "<reasoning> without </reasoning>"),
        ("<|channel|>analysis<|message|>the answer is 3", "cut", "a thought is cut off"),
        ("Add. \\boxed{7", "cut", "inside \\boxed"),
        ("Add. <answer>7", "cut", "<answer> without </answer>"),
        ("Add. So the answer is", "cut", "ends at its answer mark"),
        ("####", "cut", "ends at its answer mark"),
        ("<think>a</think>####", "cut", "ends at its answer mark"),
        ("Steps.\n#### ", "answer", "no mark separates the answer from the reasoning"),
        ("-->", "cut", "ends at its answer mark"),
        ("<think>a</think>", "empty", "nothing follows the reasoning"),
        ("Four legs. The answer is 13. Wait, that cannot be, let me count ag", "answer", "doubts its last answer '13'"),
        ("So the answer is not 4.", "answer", "says what the answer is not"),
        ("x = \\boxed{3} or x = \\boxed{5}", "answer", "several boxed answers: '3' and '5'"),
        ("(a) $\\boxed{3}$\n(b) $\\boxed{5}$", "answer", "several boxed answers: '3' and '5'"),
        ("Part 1: \\boxed{3}\n\n**Part 2:** \\boxed{5}", "answer", "several boxed answers: '3' and '5'"),
        ("\\[ x = \\boxed{3} \\]\n\\[ y = \\boxed{5} \\]", "answer", "several boxed answers: '3' and '5'"),
        ("Add. The answer is 5.\n\nQ: 2 + 4?\nA: Add. The answer is 6.", "answer", "goes on with another question"),
        ("Add.\n#### 5\n\nHuman: 2 + 4?\n\nAssistant: The answer is 6.", "answer", "goes on with another question"),
        ("A cat has four legs. Hmm, let me count", "answer", "no mark separates the answer from the reasoning"),
        ("3 cats.\n#### Step 2", "answer", "no mark"),
        ("<think>a</think>\nFirst 3.\nThen 4.", "answer", "2 lines follow the thought, and none marks the answer"),
    ],
)
def test_a_reply_whose_answer_cannot_be_told_is_refused(reply, code, what):
    with pytest.raises(RowError) as caught:
        split_reply(reply)
    assert caught.value.code == code
    assert what in caught.value.what


def _load(tmp_path, rows, test=(), arm="pst", **data):
    files = {"train": rows, **({"test": test} if test else {})}
    for name, content in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    named = {name: f"{name}.jsonl" for name in files}
    settings = {"root": str(tmp_path), "validation_size": 0, **named, **data}
    return survey(Config.model_validate({"arm": arm, "data": settings}))


def _chat(question, reply):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def test_a_cut_thought_is_a_bad_row_in_every_split_and_arm(tmp_path):
    good = [_chat(f"Legs of {n} cats?", f"<think>{n} x 4</think>{n * 4}") for n in range(1, 4)]
    cut = [_chat("Legs of 9 cats?", "<think>Let me see. So the answer is 35")]
    unmarked = [_chat("Legs of 8 cats?", "A cat has 4 legs. Hmm, let me count")]
    for arm in ("pst", "answer_only"):
        loaded = _load(tmp_path, good + cut, [*cut, *unmarked, *good[:1]], arm)
        assert [reject.code for reject in loaded.rejects] == ["cut", "cut", "answer"]
        assert [sample.answer for sample in loaded.splits["test"]] == ["4"]
        assert [sample.answer for sample in loaded.splits["train"]] == ["8", "12"]  # the first question is in test


@pytest.mark.parametrize("name", ["question", "problem"])
def test_a_file_of_marked_replies_is_recognised_although_single_rows_lack_the_mark(tmp_path, name):
    rows = [{name: f"{n} + 1?", "answer": f"{n} and one.\n#### {n + 1}"} for n in range(5)]
    loaded = _load(tmp_path, [*rows, {name: "9 + 1?", "answer": "9 and one is, let me see"}])
    assert [sample.answer for sample in loaded.splits["train"]] == ["1", "2", "3", "4", "5"]
    assert [reject.line for reject in loaded.rejects] == [6]


OPEN_R1 = {
    "problem": "What is 3 + 4?",
    "solution": "Add them: $\\boxed{7}$",
    "answer": "7",
    "generations": [
        "<think>Three and four.</think>\nIt is $\\boxed{7}$.",
        "<think>I guess.</think>\n\\boxed{8}",
        "<think>Still.</think>\nIt is",
        "<think>Count up.</think>\n\\boxed{7}",
        "<think>Cut off, although",
    ],
    "is_reasoning_complete": [True, True, False, True, True],
    "correctness_math_verify": [True, False, None, False, True],
    "correctness_llama": [None, False, None, True, None],
    "messages": [
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "<think>Three and four.</think>\nIt is $\\boxed{7}$."},
    ],
}


def test_open_r1_rows_use_the_answer_column_and_every_complete_and_right_generation():
    columns = guess_columns([OPEN_R1], "f")
    found = columns.fields(OPEN_R1)
    assert (columns.name, found.question, found.answer) == ("generations", "What is 3 + 4?", "7")
    assert found.rationales == ("Three and four.\n\nIt is $\\boxed{7}$.", "Count up.\n\n\\boxed{7}")
    bare = {name: OPEN_R1[name] for name in ("problem", "answer", "generations")}
    assert len(guess_columns([bare], "f").fields(bare).rationales) == 4  # the cut one is never a rationale
    with pytest.raises(RowError, match="is_reasoning_complete does not have one value for each of the 5"):
        columns.fields({**OPEN_R1, "is_reasoning_complete": [True]})


def test_a_clean_answer_column_beside_a_reply_is_the_gold_answer():
    row = {**_chat("3 + 4?", "<think>a</think>\nI get \\boxed{8}"), "answer": "7"}
    found = guess_columns([row], "f").fields(row)
    assert (found.answer, found.teacher_answer) == ("7", "8")
    row = {"problem": "3 + 4?", "solution": "Add: \\boxed{7}", "answer": "7"}
    found = guess_columns([row], "f").fields(row)
    assert (found.answer, found.rationales) == ("7", ("Add: \\boxed{7}",))


@pytest.mark.parametrize(
    "name", ["chain", "thinking_trajectories", "deepseek_reasoning", "reasoning_trace", "deepseek_thinking_trajectory"]
)
def test_published_names_of_rationale_columns_are_known(name):
    row = {"question": "3 + 4?", "answer": "7", name: ["Add."] if name.endswith("ies") else "Add."}
    assert guess_columns([row], "f").fields(row).rationales == ("Add.",)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_in_a_field_of_the_turn_is_the_rationale(key):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", key: "Add.", "content": "7"}]}
    found = guess_columns([row], "f").fields(row)
    assert (found.rationales, found.answer) == (("Add.",), "7")


def test_a_mapped_answer_column_that_holds_a_reply_is_split(tmp_path):
    rows = [{"q": f"{n}?", "r": f"<think>because of {n}</think>{n}"} for n in range(2)]
    loaded = _load(tmp_path, rows, columns={"question": "q", "answer": "r"})
    assert [(sample.answer, sample.rationales) for sample in loaded.splits["train"]] == [
        ("0", ("because of 0",)),
        ("1", ("because of 1",)),
    ]
    loaded = _load(tmp_path, [{"q": "1?", "r": "<think>the answer is 3"}], columns={"question": "q", "answer": "r"})
    assert [reject.code for reject in loaded.rejects] == ["cut"]


def test_where_no_rationale_is_found_the_unused_text_columns_are_named(tmp_path):
    rows = [{"question": f"{n}?", "answer": "a", "id": n, "my_notes": "first this, then that"} for n in range(3)]
    loaded = _load(tmp_path, rows)
    assert loaded.report["unused_text_columns"] == ["my_notes"]
    config = {"data": {"root": str(tmp_path), "train": "train.jsonl"}}
    with pytest.raises(DataError, match="unused text columns: my_notes"):
        load_data(Config.model_validate(config))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I add.\n\nSo it is \\boxed{4}.", "4"),
        ("The answer is 4.", "4"),
        ("**Answer:** 4", "4"),
        ("Four, as 2 + 2 = 4. So the answer is 4.", "4"),
        ("2 H2 + O2 --> 2 H2O", "2 H2 + O2 --> 2 H2O"),
        ("He said the answer is no and left", "He said the answer is no and left"),
        ("four", "four"),
    ],
)
def test_a_reply_in_the_answer_column_is_split_beside_a_rationale_too(answer, expected):
    row = {"question": "2+2?", "reasoning": "Two more.", "answer": answer}
    found = guess_columns([row], "f").fields(row)
    assert (found.answer, found.rationales) == (expected, ("Two more.",))


def test_a_template_takes_the_answer_column_as_it_is():
    row = {"question": "Which song?", "answer": "The answer is blowing in the wind", "why": "It is by Dylan."}
    columns = choose_columns({"question": "question", "answer": "{answer}", "rationale": "why"}, [row], "f")
    assert columns.fields(row).answer == row["answer"]


def test_a_reply_that_goes_on_after_its_end_is_refused():
    with pytest.raises(RowError, match=r"goes on after <\|im_end\|>"):
        split_reply("I add. The answer is 4.<|im_end|> <|im_start|>user")


def test_an_arrow_is_a_mark_only_before_the_word_end():
    assert not has_mark("2 H2 + O2 --> 2 H2O")
    assert split_reply("Burn it. --> 2 H2O END") == ("Burn it.", "2 H2O")


@pytest.mark.parametrize(
    ("reply", "rationale"),
    [
        ("I add. The answer is 4.<|im_end|>", "I add."),
        ("I add. The answer is 4.</s>\n", "I add."),
        ("<think>I add.</think>4<|eot_id|><|endoftext|>", "I add."),
        ("I add.\n#### 4<|end_of_text|>", "I add."),
        ("<think>I add.</think>\n<output>The answer is 4.</output>", "I add."),
        ("<Thought>I add.</Thought><Output>4</Output>", "I add."),
        ("<think>I add.</think><solution>\n4\n</solution><|im_end|>", "I add."),
    ],
)
def test_what_closes_a_reply_is_no_part_of_its_answer(reply, rationale):
    assert split_reply(reply) == (rationale, "4")
