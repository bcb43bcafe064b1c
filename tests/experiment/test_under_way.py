"""What an experiment says while its runs work."""

from __future__ import annotations

from pathlib import Path

from pst_dist.experiment.spec import load_experiment, runs_of
from pst_dist.experiment.under_way import UnderWay, state_of
from pst_dist.training.reporting.live import Live


def test_a_line_every_ten_seconds_says_how_far_each_run_is(tmp_path, caplog):
    file = tmp_path / "e.yaml"
    file.write_text(
        f"name: e\noutput_dir: {tmp_path}/out\nsettings: {{train.max_steps: 3300}}\n"
        "tasks: {letters: {data.train: 'gen:last_letters?rows=40&words=2'}}\n"
        "variants: {one: {arm: answer_only}, two: {arm: pre_thinking}, three: {arm: post_thinking}}\n"
    )
    runs = runs_of(load_experiment(str(file)))[:3]
    folders = [Path(run.config.output_dir) for run in runs]
    for folder in folders[:2]:
        folder.mkdir(parents=True)
    total = runs[0].config.train.max_steps
    live = Live(folders[0], "answer_only", first_step=0, total=total)
    with live:
        live.logged({"step": 1410, "loss": 0.25}, [])
        live.stepped(1410)
    now = 0.0
    under_way = UnderWay(clock=lambda: now)
    with caplog.at_level("INFO", logger="pst_dist"):
        now = 9.0
        under_way.look(runs)
        assert not caplog.messages
        now = 10.0
        under_way.look(runs)
    assert caplog.messages == [
        f"in progress: {runs[0].name}: step 1,410/{total:,}, loss 0.250; {runs[1].name}: starting"
    ]
    (folders[0] / "train.json").write_text("{}")
    assert state_of(runs[0]) == "scoring"
    assert state_of(runs[2]) == ""
