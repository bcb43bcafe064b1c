"""The stages as functions: typed results, resuming, settings without effect, and names imported when first used."""

import ast
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from api_run import ROWS, small

import pst_dist
from pst_dist import api
from pst_dist.cli.main import run_verb
from pst_dist.config.loading import dump_config
from pst_dist.errors import ConfigError, EnvironmentFault, StaleError
from pst_dist.storage.manifest import read_json, read_manifest, sha256_file
from pst_dist.training import loop


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
    take_step = loop.take_step

    def interrupted(engine, state, *arguments, **settings):
        if state.step + 1 == step:
            monkeypatch.setattr(loop, "take_step", take_step)
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(engine, state, *arguments, **settings)

    monkeypatch.setattr(loop, "take_step", interrupted)


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
        take_step = loop.take_step
        monkeypatch.setattr(
            loop,
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
