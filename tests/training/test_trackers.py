"""Trackers: the real libraries in offline mode, a tracker of somebody else's, and trackers that fail."""

import json
import logging
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_run import small_config

from pst_dist.config.loading import dump_config, load_config
from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config
from pst_dist.distributed.ranks import Ranks
from pst_dist.errors import ConfigError
from pst_dist.storage.manifest import read_lines
from pst_dist.training.fingerprint import training_settings
from pst_dist.training.reporting.all_trackers import Trackers
from pst_dist.training.reporting.metrics import MetricsLog
from pst_dist.training.reporting.step_record import StepRecord
from pst_dist.training.reporting.trackers import TrackedRun, Tracker
from pst_dist.training.validation import ValidationScore

SECRET = "canary-password"
CONFIG = Config(seed=7, data_dir=f"sftp://someone:{SECRET}@host/data")


def report(name: str, folder: Path) -> None:
    """Two starts of one training: steps 1 and 2, then 2 and 3 after a resume from step 1."""
    folder.mkdir()
    for first, losses in ((0, {1: 2.5, 2: 2.25}), (1, {2: 2.0, 3: 1.5})):
        trackers = Trackers([name], TrackedRun(folder, "run", first), CONFIG)
        for step, loss in losses.items():
            trackers.log(step, {"loss": loss, "nothing": float("nan"), "words": "no number"})
        trackers.finish(failed=first == 0)


def assert_no_secret(folder: Path) -> None:
    for path in folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report("tensorboard", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 2.0), (3, 1.5)]
    assert events.Tags()["scalars"] == ["loss"]


def leveldb_records(text: bytes) -> Iterator[bytes]:
    """The records of a .wandb file after its header, which is a log as LevelDB writes it.

    Blocks of 32 KiB (the first counts the header's 7 bytes) hold pieces: checksum, length, and whether the piece is a
    whole record (1) or its first, a middle or its last part (2, 3, 4). See LevelDB's doc/log_format.md.
    """
    place, record = 0, b""
    while place + 7 <= len(text):
        left = 32768 - (place + 7) % 32768
        if left < 7:  # too short for a piece: zeros up to the next block
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", text, place)
        record += text[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def test_wandb_offline_gets_the_numbers_the_config_and_no_command_line(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(sys, "argv", ["pst", "train", f"data_dir=sftp://someone:{SECRET}@host/data"])
    report("wandb", tmp_path / "run")
    wandb.teardown()  # its service writes the files; this waits until it has
    losses, configs, names = [], {}, set()
    for path in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        names.add(path.name)
        for data in leveldb_records(path.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                losses.append((row["_step"], row["loss"]))
                assert "nothing" not in row and "words" not in row
            if record.HasField("run"):
                configs |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert losses == [(1, 2.5), (2, 2.25), (2, 2.0), (3, 1.5)]
    assert configs["seed"] == 7 and configs["data_dir"] == "sftp://***@host/data"
    assert len(names) == 1, "a resumed training is the same run"
    assert_no_secret(tmp_path)


def test_mlflow_keeps_one_run_with_every_step_and_the_config(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    pytest.importorskip("sqlalchemy", reason="needs the extra mlflow")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    report("mlflow", tmp_path / "run")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    experiment = client.get_experiment_by_name("pst_dist")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 2.5), (2, 2.0), (2, 2.25), (3, 1.5)]
    assert run.data.params["seed"] == "7" and run.data.params["train.learning_rate"] == "0.001"
    assert run.data.params["data_dir"] == "sftp://***@host/data"
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "nothing beside the run directory"


def test_trackio_keeps_its_rows_in_a_local_file(tmp_path, monkeypatch, capsys):
    trackio = pytest.importorskip("trackio", reason="needs the extra trackio")
    from trackio import sqlite_storage

    for module in (trackio, sqlite_storage, sys.modules["trackio.utils"]):  # read from TRACKIO_DIR when imported
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path, raising=False)
    report("trackio", tmp_path / "run")
    with sqlite3.connect(tmp_path / "pst_dist.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert [(step, json.loads(values)["loss"]) for _, step, values in rows] == [(1, 2.5), (2, 2.25), (2, 2.0), (3, 1.5)]
    assert capsys.readouterr().out == ""


class Fails(Tracker):
    """Breaks in the method that its class variable names."""

    where = "start"

    def start(self, run, config):
        self._fail("start")

    def log(self, step, values):
        self._fail("log")

    def finish(self, failed):
        self._fail("finish")

    def _fail(self, here):
        if here == self.where:
            raise RuntimeError("no server at http://me:canary-password@host")


@pytest.fixture
def third_party(tmp_path, monkeypatch) -> str:
    """A package that brings the tracker `fails`, installed in a folder of its own."""
    info = tmp_path / "site" / "somebody-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[pst_dist.trackers]\nfails = test_trackers:Fails\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return "fails"


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_tracker_that_fails_is_named_once_and_the_metrics_file_is_complete(
    tmp_path, monkeypatch, caplog, third_party, where
):
    monkeypatch.setattr(Fails, "where", where)
    config = small_config(tmp_path / "data", tmp_path / "run", train__report_to="[fails, tensorboard]")
    run = run_dir(config)
    run.path.mkdir()
    caplog.set_level(logging.WARNING, "pst_dist")
    record = StepRecord(1, {"answer": 2.0}, {"answer": 2.0}, None, None, 1.0, 0.1, 8, 0.25)
    with MetricsLog(config, run, Ranks(), first_step=0, total=3) as metrics:
        for step in (1, 2, 3):
            metrics.step(StepRecord(**{**vars(record), "step": step}), epoch=0)
        metrics.validation(3, ValidationScore(answer_nll=1.5, loss=1.5))
    said = [message for message in caplog.messages if "tracker" in message]
    assert said == [
        "tracker fails failed and receives no more metrics; training continues (RuntimeError: no server at http://***@host)"
    ]
    assert [row["step"] for row in read_lines(run.metrics)] == [1, 2, 3, 3]
    assert list((run.path / "tensorboard").iterdir()), "the other tracker is not touched"


def test_a_tracker_whose_package_is_missing_says_what_to_install(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    Trackers(["wandb"], TrackedRun(tmp_path, "run", 0), CONFIG).log(1, {"loss": 1.0})
    assert caplog.messages[0].endswith("(the package wandb is not installed: pip install 'pst-dist[wandb]')")


def test_only_rank_zero_reports(tmp_path):
    config = small_config(tmp_path / "data", tmp_path / "run", train__report_to="tensorboard")
    with MetricsLog(config, run_dir(config), Ranks(1, 1, 2), first_step=0, total=3) as metrics:
        metrics.step(StepRecord(1, {}, {}, None, None, 1.0, 0.1, 8, 0.25), epoch=0)
    assert metrics.trackers is None and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("tensorboard", ["tensorboard"]),
        ("none", []),
        ("null", []),
        ("[]", []),
        ("[tensorboard, wandb]", ["tensorboard", "wandb"]),
    ],
)
def test_report_to_takes_one_name_or_a_list_and_a_saved_config_says_the_same(tmp_path, word, names):
    config = load_config(None, [f"train.report_to={word}"])
    assert config.train.report_to == names
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "saved.yaml")) == config
    other = load_config(None, [])
    assert training_settings(config, "s", "e", 8) == training_settings(other, "s", "e", 8), "a resume is not refused"


def test_an_unknown_tracker_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match="no tracker 'tensorbord'; choose from none, tensorboard, wandb"):
        load_config(None, ["train.report_to=[tensorbord]"])
    with pytest.raises(ConfigError, match="names a tracker twice"):
        load_config(None, ["train.report_to=[wandb, wandb]"])


def test_a_saved_config_of_an_earlier_version_still_loads(tmp_path):
    old = dump_config(Config()).replace("  report_to:\n  - tensorboard\n", "  report_to: tensorboard\n")
    assert "report_to: tensorboard" in old
    (tmp_path / "old.yaml").write_text(old)
    assert load_config(str(tmp_path / "old.yaml")) == Config()
