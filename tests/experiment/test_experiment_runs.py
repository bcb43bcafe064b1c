"""Runs of an experiment in workers: refused before the first, failing, told to stop, killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from experiments import SMALL, accuracies, pst, write
from waiting import wait_until

from pst_dist.cli.main import run_verb
from pst_dist.errors import DivergedError, PstError, StaleError
from pst_dist.experiment.checks import check_runs
from pst_dist.experiment.driver import run_experiment
from pst_dist.experiment.spec import load_experiment, runs_of

SPLITS = {"test": None, "test_size": 8, "validation_size": 8}


def test_a_warning_of_one_of_many_runs_says_which(tmp_path):
    variants = {"all words": {"arm": "post_thinking", "loss.rationale_weight": 10_000, "train.logging_steps": 2}}
    done = pst(str(write(tmp_path / "e.yaml", variants=variants, seeds=[0])), "jobs=1")
    assert done.returncode == 0, done.stderr
    assert "letters / all words / seed 0: step 2: the rationale term contributes" in done.stderr


def test_results_are_not_overwritten_because_a_setting_or_the_rows_changed(tmp_path):
    rows = tmp_path / "here" / "rows.jsonl"
    rows.parent.mkdir()
    lines = [json.dumps({"question": f"Say {n}", "rationale": "It is said.", "answer": str(n)}) for n in range(60)]
    rows.write_text("\n".join(lines[:40]))
    tasks = {"words": {"task": "arithmetic", "data": {"train": "rows.jsonl", "root": str(rows.parent)} | SPLITS}}
    file = write(tmp_path / "e.yaml", tasks=tasks, variants={"own": {"arm": "answer_only"}}, seeds=[0], keep="results")

    def again(*words: str):
        return run_experiment(load_experiment(str(file), list(words)), ["pst"])

    assert again()[1] is None
    folder = tmp_path / "e" / "runs" / "words" / "own" / "seed-0"
    results = (folder / "eval" / "test" / "results.json").read_bytes()
    assert not (folder / "best").exists() and not (folder / "checkpoints").exists()

    other = "train.learning_rate=3e-4"
    said = r"words / own / seed 0 is finished with train\.learning_rate=.*, this experiment has .*=0\.0003; restore it"
    with pytest.raises(StaleError, match=said):
        again(other)
    assert run_verb(["experiment", str(file), "--dry-run", other]) == StaleError.exit_code
    rows.rename(tmp_path / "rows.jsonl")
    assert not again(f"data.root={tmp_path}")[0].missing, "the same rows elsewhere are the same rows"
    (tmp_path / "more").mkdir()
    for place, said in (
        (tmp_path / "more", "is finished with other rows, this experiment has new ones"),
        (tmp_path, "made from different rows or settings; restore them, choose another output_dir, or delete"),
    ):
        (place / "rows.jsonl").write_text("\n".join(lines))
        with pytest.raises(StaleError, match=said):
            again(f"data.root={place}")
    assert (folder / "eval" / "test" / "results.json").read_bytes() == results and not (folder / "best").exists()


def test_runs_that_train_the_same_are_trained_once(tmp_path):
    variants = {
        "own": {"arm": "pre_thinking"},
        "given": {"arm": "pre_thinking", "evaluate.rationale": "teacher"},
        "other": {"arm": "pre_thinking", "train.learning_rate": 3e-4},
    }
    file = write(tmp_path / "e.yaml", variants=variants, seeds=[0])
    experiment = load_experiment(str(file), ["jobs=1"])
    own, given, other = runs_of(experiment)
    assert (own.alike, given.alike, other.alike) == ((), (own.config.output_dir,), ())
    results, error = run_experiment(experiment, ["pst"])
    assert error is None and len(results.groups) == 3
    records = [json.loads((Path(run.config.output_dir) / "train.json").read_text()) for run in (own, given, other)]
    assert records[0] == records[1] != records[2]  # to the second of training time
    assert not (Path(given.config.output_dir) / "checkpoints").exists()


def test_a_run_that_fails_is_named_and_keeps_no_other(tmp_path):
    variants = {"good": {"arm": "answer_only"}, "bad": {"arm": "answer_only", "train.learning_rate": 1e30}}
    file = write(tmp_path / "e.yaml", variants=variants, seeds=[0])
    results, error = run_experiment(load_experiment(str(file), ["jobs=1"]), ["pst"])
    assert isinstance(error, DivergedError)
    assert [group.variant for group in results.groups] == ["good"]
    assert list(results.failures) == ["letters / bad / seed 0"]
    assert "## Failed runs" in (tmp_path / "e" / "README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss.rationale_weight": 0}, r"loss\.rationale_weight is 0"),
        ({"task": "last_letters"}, r"no task 'last_letters'"),
        ({"train.deepspeed": "zero4"}, r"no profile 'zero4'"),
        ({"data.test": None}, r"there are no test rows"),
        ({"student.model_name_or_path": "./nowhere"}, r"nowhere"),
    ],
)
def test_what_the_last_run_would_fail_on_is_refused_before_the_first(tmp_path, changes, said):
    variants = {"good": {"arm": "answer_only"}, "bad": {"arm": "pre_thinking"} | changes}
    file = write(tmp_path / "e.yaml", variants=variants, seeds=[0])
    with pytest.raises(PstError, match=said) as raised:
        run_experiment(load_experiment(str(file), ["jobs=1"]), ["pst"])
    assert "task letters, variant bad: " in str(raised.value)
    assert not (tmp_path / "e" / "data").exists() and not (tmp_path / "e" / "runs").exists()
    # With Ray, students are loaded on its nodes, which may have what this machine lacks.
    runs = runs_of(load_experiment(str(file), ["backend=ray"]))
    if "task" in changes or "data.test" in changes:
        with pytest.raises(PstError, match=said):
            check_runs(runs, here=False)
    else:
        check_runs(runs, here=False)


def test_a_dry_run_lists_the_runs_and_then_what_one_of_them_would_fail_on(tmp_path):
    variants = {"good": {"arm": "answer_only"}, "bad": {"arm": "pst", "loss.layer": 3}}
    done = pst(str(write(tmp_path / "e.yaml", variants=variants, seeds=[0])), "--dry-run")
    assert done.returncode == 2 and len(done.stdout.splitlines()) == 2
    assert "task letters, variant bad: loss.layer=3: the student has layers 1 to 1" in done.stderr


TWO = {name: SMALL["variants"][name] for name in ("answer_only", "no alignment")}


LONG = ("train.max_steps=300", "train.eval_steps=300", "train.save_steps=20", "seeds=[0]", "jobs=2")


def start(file: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pst_dist.cli", "experiment", str(file), *LONG],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def workers_of(pid: int) -> list[int]:
    """Children of the driver that train, the oldest first; the resource tracker of multiprocessing is none."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        line = Path(f"/proc/{child}/cmdline").read_bytes()
        if b"spawn_main" in line:
            found.append(int(child))
    return found


@pytest.mark.slow
def test_told_to_stop_all_runs_save_and_a_killed_worker_is_replaced(tmp_path):
    file = write(tmp_path / "e.yaml", variants=TWO)
    folder = file.with_suffix("")

    def checkpoints() -> int:
        return len(list(folder.glob("runs/letters/*/seed-0/checkpoints/checkpoint-*")))

    first = start(file)
    wait_until(lambda: checkpoints() >= 2, "two checkpoints", seconds=180)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=120)
    assert first.returncode == 75, said
    assert "every run has saved" in said
    second = start(file)
    try:
        wait_until(lambda: checkpoints() >= 3 and len(workers_of(second.pid)) == 2, "more checkpoints", seconds=180)
        os.kill(workers_of(second.pid)[0], signal.SIGKILL)
        out, said = second.communicate(timeout=300)
    finally:
        if second.poll() is None:
            second.kill()
    assert second.returncode == 0, said
    assert "its process was killed by SIGKILL; restarting it" in said
    assert "2 runs, 2 to do" in said and "no alignment" in out
    undisturbed = write(tmp_path / "u.yaml", variants=TWO)
    done = pst(str(undisturbed), *LONG)
    assert done.returncode == 0, done.stderr
    assert accuracies(file) == accuracies(undisturbed)


@pytest.mark.slow
def test_workers_save_and_end_when_the_driver_is_killed(tmp_path):
    file = write(tmp_path / "e.yaml", variants={"answer_only": {"arm": "answer_only"}})
    driver = start(file)
    wait_until(lambda: list(tmp_path.rglob("checkpoint-*/manifest.json")), "a checkpoint", seconds=180)
    workers = workers_of(driver.pid)
    driver.kill()
    driver.communicate(timeout=60)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the workers' end")
    again = pst(str(file), *LONG)
    assert again.returncode == 0, again.stderr


def test_the_worker_does_not_answer_for_a_parent_that_is_gone():
    """A worker whose parent died before it could ask to be told ends at once."""
    from multiprocessing import Pipe

    from pst_dist.experiment.workers import _serve

    ours, theirs = Pipe()
    started = time.monotonic()
    _serve(theirs, None, 1, os.getppid() + 1)
    assert time.monotonic() - started < 60
    ours.close()
