"""The Ray files of `cluster/`: as far as one can tell without a cluster, they are what Ray and KubeRay take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from pst_dist.config.keys import known_keys
from pst_dist.config.loading import load_config

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster" / "ray-cluster.yaml"
JOB = ROOT / "cluster" / "rayjob.yaml"


def config_of(command: str) -> Any:
    """The config that a `pst run` in one of these files would have, less the file it names."""
    words = [word for word in shlex.split(command)[3:] if word != "on=ray"]
    return load_config(None, [*words, "embed.backend=ray", "train.backend=ray"])


@pytest.mark.ray
def test_the_cluster_file_is_what_rays_launcher_takes():
    pytest.importorskip("ray", reason="needs ray")
    pytest.importorskip("jsonschema", reason="needs jsonschema")
    from ray.autoscaler._private.util import prepare_config, validate_config

    raw = yaml.safe_load(CLUSTER.read_text())
    # The launcher itself fills in what a machine of one's own needs no words for, then looks.
    validate_config(prepare_config(raw))
    starts = raw["head_start_ray_commands"] + raw["worker_start_ray_commands"]
    for command in starts:
        assert "ray start" not in command or command.startswith("RAY_AUTH_MODE=token "), "a cluster open to all"
    with pytest.raises(Exception, match="cluster_nam"):
        validate_config(prepare_config({**raw, "cluster_nam": "x"}))


@pytest.mark.ray
def test_the_cloud_words_at_its_end_are_right_too():
    pytest.importorskip("ray", reason="needs ray")
    pytest.importorskip("jsonschema", reason="needs jsonschema")
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    text = CLUSTER.read_text()
    commented = text[text.index("#   provider: {type: aws") :]
    cloud = yaml.safe_load(re.sub(r"(?m)^#(   )?", "", commented))
    own = {key: value for key, value in yaml.safe_load(text).items() if key != "min_workers"}
    filled = fillout_defaults(own | cloud)
    validate_config(filled)
    assert filled["available_node_types"]["gpu"]["max_workers"] == filled["max_workers"] == 4


def test_the_kubernetes_job_has_what_kuberay_asks_for():
    job = yaml.safe_load(JOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"]["name"]
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True and isinstance(spec["backoffLimit"], int)
    cluster = spec["rayClusterSpec"]
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52) and cluster["authOptions"]["mode"] == "token"
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for node in (cluster["headGroupSpec"], group):
        assert all(isinstance(value, str) for value in node["rayStartParams"].values())  # KubeRay takes text alone
        pod = node["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] and container["resources"]["limits"] == container["resources"]["requests"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]} >= {"shared", "config"}


def test_its_command_fits_the_cluster_that_it_asks_for():
    job = yaml.safe_load(JOB.read_text())
    spec = job["spec"]
    assert spec["entrypoint"].startswith("pst run /config/my.yaml on=ray ")
    config = config_of(spec["entrypoint"])
    assert config.output_dir.startswith("/shared/")
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = group["replicas"] * limits["nvidia.com/gpu"]
    assert config.train.ray.num_workers * config.train.ray.num_gpus_per_worker == gpus
    assert config.train.ray.num_cpus_per_worker <= float(limits["cpu"])
    assert config.embed.ray.num_gpus_per_actor <= limits["nvidia.com/gpu"]


@pytest.mark.parametrize("path", [CLUSTER, JOB, ROOT / "cluster" / "README.md"])
def test_the_keys_that_these_files_speak_of_exist(path):
    keys = set(known_keys())
    named = re.findall(r"\b((?:train|embed)\.(?:ray\.)?[a-z_]+)=", path.read_text())
    assert named and set(named) <= keys
