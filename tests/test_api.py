"""The Python API as a notebook uses it: rows as objects, typed results, resuming, and errors that are ours."""

import ast
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from talking import TALKS, messages
from tiny import fitted

import pst_dist
from pst_dist import api
from pst_dist.cli.main import run_verb
from pst_dist.config.loading import dump_config
from pst_dist.data.sources.in_memory import rows_file
from pst_dist.errors import ConfigError, DataError, EnvironmentFault, InputError, IntegrityError, StaleError
from pst_dist.storage.manifest import read_json, read_manifest, sha256_file
from pst_dist.training import trainer

ROWS = [{"question": f"What is {n} + 1?", "answer": n + 1, "notes": {"why": f"{n} and one"}} for n in range(40)]
TEST = [{"question": f"What is {n} + 1?", "answer": n + 1, "notes": {"why": f"{n} and one"}} for n in range(40, 52)]


def small(output: Path, *, train=ROWS, test=TEST, **changes) -> dict:
    """Keywords of a run of eight steps over those rows."""
    keys = {
        "arm": "answer_only",
        "output_dir": output,
        "data": {
            "train": train,
            "test": test,
            "columns": {"question": "question", "answer": "answer", "rationale": "notes.why"},
            "answer_type": "number",
            "validation_size": 8,
        },
        "student": {"fresh": {"hidden_size": 32, "num_layers": 1, "num_heads": 2}},
        "train": {
            "max_steps": 8,
            "global_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "eval_steps": 4,
            "report_to": "none",
            "num_threads": 1,
        },
        "evaluate": {"latency_rows": 2, "max_new_tokens": 12},
    }
    return keys | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return pst_dist.run(None, **small(tmp_path_factory.mktemp("api") / "run"))


def test_importing_the_package_needs_neither_torch_nor_pydantic():
    script = (
        "import sys, time\n"
        "started = time.monotonic()\n"
        "import pst_dist\n"
        "names = set(dir(pst_dist))\n"
        "assert set(pst_dist.__all__) <= names and 'api' in names, names\n"
        "light = {'torch', 'numpy', 'pydantic', 'pandas', 'pst_dist.api'} & set(sys.modules)\n"
        "assert not light, light\n"
        "assert pst_dist.load_config('demo').arms\n"
        "for name in pst_dist.__all__: getattr(pst_dist, name)\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'transformers', 'datasets', 'webdataset', 'pandas'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_train_is_the_launchers_module_and_the_function_is_in_api():
    import pst_dist.train

    assert callable(pst_dist.train.main) and callable(api.train)
    assert "train" not in pst_dist.__all__ and set(api.__all__) - set(pst_dist.__all__) == {"train"}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        pst_dist.trian  # noqa: B018


def test_type_checkers_see_every_name():
    source = Path(pst_dist.__file__)
    assert (source.parent / "py.typed").is_file()
    guarded = next(node for node in ast.parse(source.read_text()).body if isinstance(node, ast.If))
    assert ast.unparse(guarded.test) == "TYPE_CHECKING"
    seen = {name.name for statement in guarded.body for name in statement.names}
    assert seen | {"__version__"} == set(pst_dist.__all__)


def test_a_run_returns_what_its_directory_holds(finished):
    arm = finished["answer_only"]
    root = finished.output_dir
    assert [one.arm for one in finished] == ["answer_only"] and arm.output_dir == root
    record, results = read_json(root / "train.json"), read_json(root / "eval" / "test" / "results.json")
    training, scores = arm.training, arm.evaluation
    assert (training.steps, training.tokens, training.best_step) == (8, record["tokens"], record["best_step"])
    assert [row["step"] for row in training.history] == list(range(1, 9))
    assert [row["step"] for row in training.validation] == [4, 8]
    assert training.best_value == min(row["answer_nll"] for row in training.validation)
    assert (scores.count, scores.correct, scores.split, scores.task) == (12, results["correct"], "test", "number")
    assert scores.accuracy == sum(row.correct for row in scores.rows) / 12
    assert scores.accuracy_stderr == pytest.approx(math.sqrt(scores.accuracy * (1 - scores.accuracy) / 12))
    assert scores.tokens == pytest.approx(sum(row.answer_tokens for row in scores.rows) / 12)
    assert [row.gold for row in scores.rows] == [str(n) for n in range(41, 53)]
    assert arm.export.joinpath("config.json").is_file() and arm.report.is_file() and finished.report == arm.report
    with pytest.raises(KeyError, match="it has answer_only"):
        finished["pst"]
    assert "What is" not in repr(finished), "rows would flood a notebook"


def test_results_convert_to_frames(finished, monkeypatch):
    pandas = pytest.importorskip("pandas")
    arm = finished["answer_only"]
    whole = finished.to_frame()
    assert isinstance(whole, pandas.DataFrame) and list(whole["arm"]) == ["answer_only"]
    assert whole["accuracy"][0] == arm.evaluation.accuracy and whole["rows"][0] == 12
    assert list(arm.training.to_frame()["step"]) == list(range(1, 9))
    frame = arm.evaluation.to_frame()
    assert list(frame["gold"]) == [row.gold for row in arm.evaluation.rows] and len(frame) == 12
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(EnvironmentFault, match="pip install pandas"):
        finished.to_frame()


def test_the_same_call_again_trains_nothing(finished):
    weights = finished.output_dir / "best" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = pst_dist.run(finished.output_dir)
    assert weights.stat().st_mtime_ns == before
    assert again.arms == finished.arms and again.config == finished.config


def test_the_command_line_goes_on_with_a_run_of_the_api(finished, capsys):
    root = finished.output_dir
    weights = root / "best" / "model.safetensors"
    before, digest = weights.stat().st_mtime_ns, read_manifest(root / "data" / "shards", "shards").digest
    assert (root / "command.txt").read_text() == f"pst_dist.run({str(root)!r})\n"
    assert run_verb(["run", str(root)]) == 0, capsys.readouterr().err
    assert weights.stat().st_mtime_ns == before
    assert read_manifest(root / "data" / "shards", "shards").digest == digest
    assert run_verb(["answer", str(root), "What is 3 + 1?"]) == 0
    assert run_verb(["verify", str(root)]) == 0


def test_the_api_goes_on_with_a_run_of_the_command_line(tmp_path, capsys):
    config = pst_dist.load_config(**small(tmp_path / "run"))
    path = tmp_path / "mine.yaml"
    path.write_text(dump_config(config))
    assert run_verb(["run", str(path)]) == 0, capsys.readouterr().err
    weights = tmp_path / "run" / "best" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    result = pst_dist.run(tmp_path / "run")
    assert weights.stat().st_mtime_ns == before and result["answer_only"].evaluation.count == 12
    assert pst_dist.run(config).arms == result.arms


def interrupt_at(monkeypatch, step: int) -> None:
    """Let Ctrl-C arrive while that step is taken."""
    take_step = trainer.take_step

    def interrupted(engine, state, *arguments, **settings):
        if state.step + 1 == step:
            monkeypatch.setattr(trainer, "take_step", take_step)
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(engine, state, *arguments, **settings)

    monkeypatch.setattr(trainer, "take_step", interrupted)


@pytest.mark.parametrize("by", ["api", "command line"])
def test_an_interrupted_run_resumes_and_ends_with_the_same_weights(by, finished, tmp_path, monkeypatch, capsys):
    interrupt_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        pst_dist.run(None, **small(tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-5").is_dir()
    assert not (tmp_path / "run" / "train.json").exists()
    if by == "api":
        taken = []
        take_step = trainer.take_step
        monkeypatch.setattr(
            trainer,
            "take_step",
            lambda engine, state, *rest, **more: taken.append(state.step) or take_step(engine, state, *rest, **more),
        )
        pst_dist.run(tmp_path / "run")
        assert taken == [5, 6, 7], "it goes on after step 5"
    else:
        assert run_verb(["run", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    best = Path("best") / "model.safetensors"
    assert sha256_file(tmp_path / "run" / best) == sha256_file(finished.output_dir / best)


def test_a_run_in_another_thread_needs_no_signals(tmp_path):
    outcome = []

    def work():
        try:
            outcome.append(api.train(None, **small(tmp_path / "run")))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert isinstance(outcome[0], api.TrainResult), outcome
    assert outcome[0].steps == 8 and (outcome[0].student / "model.safetensors").is_file()


def test_stages_one_by_one_are_those_of_the_run(finished, tmp_path):
    config = pst_dist.load_config(**small(tmp_path / "run"))
    training = api.train(config)
    arm = finished["answer_only"]
    assert training.best_value == arm.training.best_value
    scores = pst_dist.evaluate(config)
    assert scores.accuracy == arm.evaluation.accuracy and scores.rows == arm.evaluation.rows
    assert pst_dist.export(tmp_path / "run") == tmp_path / "run" / "export"
    validation = pst_dist.evaluate(tmp_path / "run", evaluate={"split": "validation"})
    assert (validation.split, validation.count) == ("validation", 8)


def test_every_container_of_the_same_rows_gives_the_same_shards(tmp_path):
    pandas, datasets = pytest.importorskip("pandas"), pytest.importorskip("datasets")
    from pst_dist.pipeline import make_shards

    files = tmp_path / "files"
    files.mkdir()
    for split, rows in (("train", ROWS), ("test", TEST)):
        lines = (json.dumps(row, sort_keys=True, separators=(",", ":")) for row in rows)
        (files / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    kinds = {
        "list": (ROWS, TEST),
        "frame": (pandas.DataFrame(ROWS), pandas.DataFrame(TEST)),
        "dataset": (datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(TEST)),
        "files": (files / "train.jsonl", files / "test.jsonl"),
    }
    digests = {}
    for name, (train, test) in kinds.items():
        config = pst_dist.load_config(**small(tmp_path / name, train=train, test=test))
        digests[name] = make_shards(config).digest
    assert len(set(digests.values())) == 1, digests
    config = pst_dist.load_config(**small(tmp_path / "one", data=datasets.DatasetDict(train=kinds["dataset"][0])))
    assert Path(config.data.train).read_bytes() == (files / "train.jsonl").read_bytes()


def test_other_rows_in_the_same_directory_are_refused_and_the_old_ones_stay(tmp_path):
    from pst_dist.pipeline import make_shards

    config = pst_dist.load_config(**small(tmp_path / "run"))
    first = make_shards(config)
    with pytest.raises(StaleError):
        api.train(None, **small(tmp_path / "run", train=ROWS[:-1]))
    assert make_shards(config).digest == first.digest
    assert [row for row in (tmp_path / "run" / "data" / "rows").rglob("train.jsonl") if str(row) == config.data.train]


def test_a_missing_answer_is_refused_by_its_row(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    frame["answer"] = frame["answer"].astype(float)
    frame.loc[6, "answer"] = float("nan")
    with pytest.raises(DataError, match="answer is missing") as caught:
        pst_dist.run(None, **small(tmp_path / "run", train=frame))
    assert caught.value.line == 7 and Path(caught.value.path).name == "train.jsonl"
    assert not (tmp_path / "run" / "data" / "shards").exists()
    tolerant = small(tmp_path / "run", train=frame)
    tolerant["data"]["max_bad"] = 1
    from pst_dist.data.sources import load_data

    splits = load_data(pst_dist.load_config(**tolerant)).splits
    assert sorted(int(row.answer) for row in (*splits["train"], *splits["validation"])) == [
        n + 1 for n in range(40) if n != 6
    ]


@pytest.mark.parametrize(
    ("arguments", "keys", "kind", "words"),
    [
        (["demo"], {"train": {"lerning_rate": 1}}, ConfigError, ["train.lerning_rate", "train.learning_rate"]),
        (["demo", "train.lerning_rate=1"], {}, ConfigError, ["train.lerning_rate", "train.learning_rate"]),
        (["demo"], {"lerning": 1}, ConfigError, ["unknown key 'lerning'"]),
        (["demo"], {"train": {"max_steps": "many"}}, ConfigError, ["train.max_steps", "'many'"]),
        (["demo"], {"train": {"max_steps": [3]}}, ConfigError, ["train.max_steps"]),
        (["demo"], {"train": 5}, ConfigError, ["train is a section"]),
        (["demo"], {"train": {3: 5}}, ConfigError, ["key 3 in train"]),
        (["demo"], {"loss": {"whiten": True, "centre": False}}, ConfigError, ["loss.whiten"]),
        (["demo"], {"arm": "pst"}, ConfigError, ["arm=pst has no effect", "arms=[pst]"]),
        (["demmo"], {}, InputError, ["demmo", "did you mean demo?"]),
        (["demo", "+papr_t5"], {}, InputError, ["did you mean +paper_t5?"]),
        (["demo", "max_steps"], {}, ConfigError, ["is not key.sub=value"]),
        (["demo", {"seed": 1}], {}, ConfigError, ["keywords"]),
        ([{"seed": 1}], {}, ConfigError, ["expected the path or name of a config"]),
        ([None], {"train": ROWS}, ConfigError, ['data={"train": rows}']),
        ([None], {"test": ROWS}, ConfigError, ['data={"test": rows}']),
        ([None], {"data": ROWS}, ConfigError, ['data={"train": rows}']),
        ([None], {"data": {"train": [*ROWS, 5]}}, DataError, ["data.train row 41", "int"]),
        ([None], {"data": {"train": {"question": ["a"]}}}, DataError, ["data.train", "mapping"]),
        ([None], {"data.test": [{"a": {1}}]}, DataError, ["data.test row 1", "a is set"]),
        ([None], {"data": {"train": []}}, DataError, ["data.train", "no rows"]),
    ],
)
def test_what_a_user_gets_wrong_is_our_error_with_its_place(arguments, keys, kind, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for function in (pst_dist.load_config, pst_dist.run, api.train, pst_dist.evaluate, pst_dist.export):
        with pytest.raises(kind) as caught:
            function(*arguments, **keys)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(tmp_path.iterdir()) == [], "nothing is written before everything is checked"


def test_a_config_does_not_change_and_its_constructor_raises_our_errors():
    config = pst_dist.load_config("demo", "seed=3", train={"max_steps": 5}, **{"train.bf16": True})
    assert (config.seed, config.train.max_steps, config.train.bf16, config.train.learning_rate) == (3, 5, True, 2e-3)
    changed = pst_dist.load_config(config, arms=["pst"])
    assert changed.arms == ["pst"] and changed.seed == 3 and len(config.arms) == 4
    with pytest.raises(ConfigError, match="is immutable"):
        config.seed = 4
    with pytest.raises(ConfigError, match="is immutable"):
        del config.train.max_steps
    with pytest.raises(ConfigError, match=r"unknown key 'train\.lr'"):
        pst_dist.Config(train={"lr": 1})
    with pytest.raises(ConfigError, match="arms names an arm twice"):
        pst_dist.Config(arms=["pst", "pst"])


def test_rows_lie_where_the_config_says_also_with_a_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = pst_dist.load_config(output_dir="run", data={"train": ROWS})
    assert config.data.train == f"run/data/rows/{rows_file(ROWS, 'train').sha256[:16]}/train.jsonl"
    assert Path(config.data.train).read_bytes() == rows_file(ROWS, "train").content
    rooted = pst_dist.load_config(output_dir="run", data={"train": ROWS, "root": "elsewhere"})
    assert Path(rooted.data.train) == tmp_path / config.data.train
    both = pst_dist.load_config(data={"train": ["a.jsonl", Path("b.jsonl")], "test": Path("c.jsonl")})
    assert (both.data.train, both.data.test) == (["a.jsonl", "b.jsonl"], "c.jsonl")


def test_a_setting_that_evaluate_does_not_read_is_refused(finished, tmp_path):
    root = finished.output_dir
    before = sorted(root.rglob("*"))
    for keys, word in (
        ({"data": {"train": ROWS[:5]}}, "data.train="),
        ({"data": {"columns": "messages"}}, "data.columns=messages"),
        ({"student": {"fresh": {"hidden_size": 64}}}, "student.fresh.hidden_size=64"),
        ({"layout": {"prompt": "{question}"}}, "layout.prompt="),
    ):
        with pytest.raises(ConfigError, match=f"{word}.* has no effect on evaluate") as caught:
            pst_dist.evaluate(root, **keys)
        assert str(root) in str(caught.value)
        with pytest.raises(ConfigError, match="has no effect on export"):
            pst_dist.export(root, **keys)
    with pytest.raises(ConfigError, match=r"evaluate\.split=validation has no effect on export"):
        pst_dist.export(root, "evaluate.split=validation")
    assert sorted(root.rglob("*")) == before
    with pytest.raises(ConfigError, match=r"train\.max_steps=9 has no effect.*made with 8"):
        pst_dist.evaluate(root, "train.max_steps=9")
    with pytest.raises(ConfigError, match=r"has no effect on evaluate"):
        pst_dist.evaluate(root, "+paper_t5")
    with pytest.raises(ConfigError, match=r"layout\.max_length=96 has no effect"):
        pst_dist.evaluate(pst_dist.load_config(finished.config, layout={"max_length": 96}))
    # How a student is made may differ between its training and its scores: ranks, threads.
    assert pst_dist.evaluate(pst_dist.load_config(finished.config, train={"num_threads": 2})).count == 12
    assert pst_dist.evaluate(root, "train.max_steps=8").count == 12, "the run's own value"
    assert pst_dist.evaluate(root, arm="answer_only").count == 12
    with pytest.raises(StaleError):
        pst_dist.evaluate(root, arm="pst")


def test_the_command_line_refuses_overrides_without_effect_too(finished, capsys):
    root = str(finished.output_dir)
    for words, said in (
        (["report", root, "seed=4"], "seed=4 has no effect on report"),
        (["evaluate", root, "data.columns=messages"], "data.columns=messages has no effect on evaluate"),
        (["export", root, "data.test=other.jsonl"], "data.test=other.jsonl has no effect on export"),
        (["evaluate", root, "data.test=other.jsonl", "data.leaks=keep"], "data.leaks=keep has no effect on evaluate"),
        (["evaluate", root, "train.learning_rate=1"], "train.learning_rate=1.0 has no effect on evaluate"),
        (["export", root, "evaluate.split=validation"], "evaluate.split=validation has no effect on export"),
        (["evaluate", root, "arms=[pst,prefix]", "arm=pst"], "arm=pst has no effect together with arms=[pst, prefix]"),
    ):
        assert run_verb(words) == 2
        assert said in capsys.readouterr().err
    assert run_verb(["evaluate", root, "evaluate.max_rows=4"]) == 0 and "on 4 test rows" in capsys.readouterr().out
    assert run_verb(["evaluate", root]) == 0


def test_one_arm_at_a_time(tmp_path):
    keys = small(tmp_path / "run", arms=["answer_only", "post_thinking"])
    del keys["arm"]
    config = pst_dist.load_config(**keys)
    for function in (api.train, pst_dist.evaluate, pst_dist.export):
        with pytest.raises(ConfigError, match="takes one arm, and this config has 2: answer_only, post_thinking"):
            function(config)


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


def test_export_returns_the_gguf_file_that_it_writes(talking_run):
    pytest.importorskip("gguf", reason="needs the package gguf")
    root = Path(talking_run.output_dir)
    file = pst_dist.export(talking_run, gguf="f16", licence="mit")
    assert file.parent == root / "gguf" / "f16" and file.suffix == ".gguf"
    assert "license: mit" in (file.parent / "README.md").read_text()
    with pytest.raises(ConfigError, match="gguf='q3' is not a type of GGUF file; use one of f32, f16, q8_0, q4_k_m"):
        pst_dist.export(talking_run, gguf="q3")
    with pytest.raises(ConfigError, match="gguf has no effect on an adapter alone"):
        pst_dist.export(talking_run, gguf=True, adapter=True)


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
