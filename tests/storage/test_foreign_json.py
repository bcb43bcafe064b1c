"""Text of other programs and people: what is wrong with it is one line that names the place."""

import json

import pytest

from pst_dist.clusters.ray.dashboard import read_version
from pst_dist.clusters.slurm.follow import read_jobs
from pst_dist.clusters.slurm.partitions import gpus_of, read_partitions
from pst_dist.config.loading import load_config
from pst_dist.config.schema import StudentConfig, TrainConfig
from pst_dist.config.zero import zero_stage
from pst_dist.diagnostics.machine.examine import compare_reports
from pst_dist.errors import ConfigError, EnvironmentFault, InputError
from pst_dist.storage.foreign_json import foreign_object, whole_number
from pst_dist.training.engines.deepspeed_config import deepspeed_settings
from pst_dist.training.memory.model_size import shape_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1e999}', "too large"),
        ('{"a": %s}' % ("9" * 5_000), "integer string conversion"),
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested deeper than 64"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"a": "\\ud800', "not JSON"),
    ],
)
def test_a_foreign_object_is_refused_with_its_reason(text, words, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=words):
        foreign_object(tmp_path / "x.json")


def test_a_whole_number_has_its_type_and_bounds(tmp_path):
    for bad in (True, None, 1.0, "7", 0, -1, 2**48 + 1, 10**5_000, [1]):
        with pytest.raises(InputError, match=r"^.*n is "):
            whole_number({"n": bad}, "n", tmp_path)
    assert whole_number({"n": 2**48}, "n", tmp_path) == 2**48


def test_a_key_given_twice_in_a_deepspeed_file_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3, "stage": 1}}')
    with pytest.raises(ConfigError, match="'stage' is given twice"):
        deepspeed_settings(TrainConfig(deepspeed=str(path)), 2)
    with pytest.raises(ConfigError, match="'stage' is given twice"):
        zero_stage(str(path))
    path.write_text('{"zero_optimization": {"stage": 2.0}}')
    with pytest.raises(ConfigError, match=r"stage is 2\.0"):
        deepspeed_settings(TrainConfig(deepspeed=str(path)), 2)


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("seed=!!int x", "cannot be read"),
        ("seed=" + "9" * 5_000, "cannot be read"),
        ("seed=0x" + "f" * 5_000, "more than 18 digits"),
        ("data.columns=" + "[" * 3_000, "nested deeper"),
        ("data.columns={question: q, question: r}", "duplicate key|twice"),
        ("data.train=2026-13-45", "cannot be read"),
        ("data.columns=!!python/object:os.system x", "could not determine a constructor"),
        ("train.learning_rate=.inf", "finite|learning_rate"),
        ("train.learning_rate=.nan", "finite|learning_rate"),
    ],
)
def test_an_override_that_cannot_be_read_names_its_key(word, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, [word])


def test_answers_of_slurm_and_ray_in_another_form_are_one_line():
    for text in ("", "slurm_load_jobs error", "JobId=1", "JobId=1 JobState=FAILED ExitCode=x:y", "JobState=RUNNING"):
        with pytest.raises(EnvironmentFault, match="cannot read the output of scontrol"):
            read_jobs(text)
    for text in ("gpu|up", "gpu|gpu*|up|many|x", "gpu|gpu*|up|" + "9" * 5_000 + "|x"):
        with pytest.raises(EnvironmentFault, match="cannot read the output of sinfo"):
            read_partitions(text)
    assert gpus_of("gpu:a100:8(S:0-1),gpu:h100:4,nvme:1") == 12
    for body in (b"[]", b"{}", b"[" * 100_000, b'{"ray_version": 2}', b'"ray_version"'):
        with pytest.raises(EnvironmentFault, match="does not name its Ray version"):
            read_version(body, "http://127.0.0.1:8265")


def test_a_report_of_a_node_has_its_parts(tmp_path):
    node = {"kind": "pst doctor", "host": "a", "packages": {"torch": "\x1b[31m2"}, "gpus": [], "cores": 10**4_000}
    (tmp_path / "a.json").write_text(json.dumps(node))
    (tmp_path / "b.json").write_text(json.dumps({**node, "host": "b", "packages": {}}))
    lines = [found.line() for found in compare_reports([tmp_path / "a.json", tmp_path / "b.json"])]
    assert any("\\x1b[31m2 on a" in line for line in lines) and all(line.isprintable() for line in lines)
    for part in ({"packages": []}, {"gpus": {}}, {"gpus": [1]}, {"host": None}, {"gpus": [{"name": "x"}]}):
        (tmp_path / "b.json").write_text(json.dumps({**node, **part}))
        with pytest.raises(InputError, match="not a report of a node"):
            compare_reports([tmp_path / "a.json", tmp_path / "b.json"])


@pytest.mark.parametrize("value", ["768", 1.5, None, True, -1, 0, 10**30, [768], {"a": 1}])
def test_a_model_config_with_a_wrong_size_names_the_key(value, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 9}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, "vocab_size": value}))
    with pytest.raises(InputError, match="vocab_size is"):
        shape_of(StudentConfig(model_name_or_path=str(tmp_path)), max_length=64)
