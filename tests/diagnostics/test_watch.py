"""`pst watch`: a real training seen through its files, its metrics endpoint, its end, and files that hold anything."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from ports import free_port
from small_run import small_config
from train_process import after_some_steps, config_file, started

from pst_dist.cli.main import run_verb
from pst_dist.config.stage import read_stage, staged, tell_stage
from pst_dist.diagnostics.watch import view_of
from pst_dist.diagnostics.watch_page import Told, screen, sparkline
from pst_dist.errors import ConfigError, EnvironmentFault, InputError, PreemptedError
from pst_dist.storage.json_files import read_json, read_lines
from pst_dist.training.reporting.prometheus import Prometheus, gauge_name
from pst_dist.training.reporting.tracker_backends import markdown_table
from pst_dist.training.reporting.trackers import TrackedRun
from pst_dist.training.trainer import train


def shown(view, width: int = 100) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=open(os.devnull, "w"))
    console.print(screen(view, time.time()))
    return console.export_text()


@pytest.mark.encoder
def test_a_training_is_watched_while_it_works_and_after_a_kill_and_to_its_end(small_data, tmp_path, capsys):
    run, port = tmp_path / "run", free_port()
    path = config_file(small_data, run, train__metrics_port=port, train__save_steps=4)
    process = started(path)
    try:
        after_some_steps(process, run, 3)
        os.kill(process.pid, signal.SIGSTOP)
        while (row := read_lines(run / "metrics.jsonl")[-1]) and "loss" not in row:
            time.sleep(0.1)
        view = view_of(run)
        assert not view.has_ended and view.stage.stage == "starting" and view.stage.pid == process.pid
        assert view.arms[0].training.total == 24 and "step" in shown(view)
        os.kill(process.pid, signal.SIGCONT)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            gauges = dict(re.findall(r"^(pst_\w+)\{arm=\"pst\",run=\"run\"\} (\S+)$", answer.read().decode(), re.M))
        steps = {row["step"]: row for row in read_lines(run / "metrics.jsonl") if "loss" in row}
        row = steps[int(float(gauges["pst_step"]))]
        assert float(gauges["pst_loss"]) == pytest.approx(row["loss"])
        assert float(gauges["pst_learning_rate"]) == pytest.approx(row["learning_rate"])
    finally:
        process.kill()
        process.communicate()
    gone = subprocess.run([sys.executable, "-m", "pst_dist.cli", "watch", str(run)], capture_output=True, text=True)
    assert gone.returncode == 7 and "error[PEER_LOST]" in gone.stderr and "the same command resumes" in gone.stderr
    assert "its process is gone" in shown(view_of(run)).splitlines()[0]
    assert run_verb(["train", str(path), "-q"]) == 0
    capsys.readouterr()
    assert run_verb(["watch", str(run)]) == 0
    said = capsys.readouterr().out
    assert "pst  step 24/24  loss " in said and "validation at step 24: " in said and said.endswith("done\n")
    assert run_verb(["watch", str(run), "--once"]) == 0
    once = capsys.readouterr().out
    assert "validation question" in once and "loss" in once and "100 %" in once


def test_a_taken_port_is_named_with_its_setting():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentFault, match=f"train.metrics_port={port}: Address already in use"):
            Prometheus(port).start(TrackedRun(Path("run"), "run", 0), {"arm": "pst"})


@pytest.mark.encoder
def test_each_validation_leaves_sample_answers_and_lengths_for_the_trackers(small_data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small_config(small_data, tmp_path, train__report_to="tensorboard", train__sample_answers=2))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    assert {"lengths/sequence", "lengths/answer"} <= set(events.Tags()["histograms"])
    # Four steps of eight rows each between two validations.
    assert [event.histogram_value.num for event in events.Histograms("lengths/sequence")] == [32, 32]
    tables = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("validation/answers/text_summary")]
    assert len(tables) == 2 and tables[0].startswith("| question | gold | answer | tokens | right |\n| --- |")
    live = read_json(tmp_path / "live.json")
    assert len(live["answers"]) == 2 and live["state"] == "done" and live["step"] == live["total"] == 8
    assert all(set(one) == {"question", "gold", "answer", "tokens", "right"} for one in live["answers"])
    train(small_config(small_data, tmp_path / "none", train__sample_answers=0))
    assert read_json(tmp_path / "none" / "live.json")["answers"] == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (ConfigError("no"), 2),
        (PreemptedError("stopped"), 75),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
    ],
)
def test_the_end_of_a_command_is_recorded_with_its_exit_code(error, code, tmp_path):
    try:
        with staged(tmp_path, "starting"):
            tell_stage("embed")
            assert view_of(tmp_path).stage.stage == "embed" and not view_of(tmp_path).has_ended
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    stage = read_stage(tmp_path)
    assert (stage.state, stage.exit_code, stage.stage) == ("ended", code, "embed")
    assert view_of(tmp_path).exit_code == code and view_of(tmp_path).has_ended


def test_arms_that_wait_and_arms_that_are_done_have_a_line_each(tmp_path):
    (tmp_path / "pst").mkdir()
    live = {"state": "running", "arm": "pst", "step": 3, "total": 9, "started": 0.0, "updated": time.time()}
    live |= {"host": os.uname().nodename, "pid": os.getpid(), "seconds_left": 65.0, "seconds_per_step": 0.5}
    ranks = [
        {"rank": k, "host": f"node{k}", "device": "cuda:0", "busy": 0.5 + k / 4, "memory_bytes": 2**30} for k in (0, 1)
    ]
    metrics = {"step": 3, "loss": 1.25, "answer_nll": 0.5, "cosine": 0.75, "tokens_per_second": 2000.0}
    warnings = [{"time": 1.0, "text": "a weight does nothing"}]
    (tmp_path / "pst" / "live.json").write_text(
        json.dumps(live | {"ranks": ranks, "metrics": metrics, "warnings": warnings})
    )
    (tmp_path / "config.resolved.yaml").write_text("arms: [pst, answer_only]\n")
    view = view_of(tmp_path)
    assert not view.has_ended
    text = shown(view)
    for words in (
        "step 3/9",
        "33 %",
        "2,000 tok/s",
        "1 min 05 s left",
        "loss 1.2500",
        "cosine 0.7500",
        "node1",
        "75 %",
    ):
        assert words in text, words
    assert "warning: a weight does nothing" in text and "answer_only  waits" in text
    told = Told()
    first = list(told.news(view))
    assert first[0].startswith("pst  step 3/9  loss 1.2500") and first[1] == "warning: a weight does nothing"
    assert list(told.news(view)) == []


def test_files_of_others_are_shown_without_their_control_characters_or_not_at_all(tmp_path):
    live = {"state": "running", "arm": "pst", "step": 1, "total": 2, "started": 0.0, "updated": 0.0}
    live |= {
        "host": "elsewhere\u001b]0;pwned\u0007",
        "pid": 1,
        "warnings": [{"time": 1.0, "text": "\u001b[2J[red]x[/red]"}],
    }
    (tmp_path / "live.json").write_text(json.dumps(live))
    text = shown(view_of(tmp_path))
    assert "\u001b" not in text and "[red]x[/red]" in text and "no sign for" in text
    for wrong in ('{"step": []}', "[1]", "{", '{"step": 1e999}'):
        (tmp_path / "live.json").write_text(wrong)
        with pytest.raises(InputError, match="no run has started here"):
            view_of(tmp_path)
    with pytest.raises(InputError, match="no such run directory"):
        view_of(tmp_path / "nowhere")


@pytest.mark.parametrize("places", [("seed-0/pst", "seed-1/pst"), ("runs/svamp/a/seed-0", "runs/svamp/raw/b/seed-0")])
def test_a_folder_of_several_runs_is_answered_with_the_newest(tmp_path, places):
    for age, place in enumerate(places):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "live.json").write_text("{}")
        os.utime(tmp_path / place / "live.json", (age, age))
    with pytest.raises(
        InputError, match=f"contains several runs; watch one of them, such as the newest: .*/{places[1]}$"
    ):
        view_of(tmp_path)


def test_small_parts():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, float("nan")]) == "" and sparkline([2.0, 2.0]) == "▁▁"
    assert gauge_name("validation/answer_nll") == "pst_validation_answer_nll"
    assert markdown_table([{"a": "x|y\nz", "b": 1}]) == "| a | b |\n| --- | --- |\n| x\\|y z | 1 |"
