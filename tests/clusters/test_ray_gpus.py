"""GPUs on Ray: a worker takes one where the cluster has any, unless the config says otherwise."""

import json
import os
import subprocess
import sys
import tempfile

import pytest

from pst_dist.clusters.ray.gpus import gpus_each, room_for, settled_actors, settled_workers
from pst_dist.clusters.ray.train import check_room
from pst_dist.config.schema import EmbedConfig, RayConfig, RayTrainConfig
from pst_dist.embedding.encoder_model import check_device, check_encoder
from pst_dist.errors import ConfigError, EnvironmentFault

WITH, WITHOUT = {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}

SCRIPT = """
import json, os, sys
from pathlib import Path
import ray
from pst_dist.clusters.ray import embed
from pst_dist.clusters.ray.connect import secure_local_cluster
from pst_dist.clusters.ray.train import _trainer
from pst_dist.clusters.ray.gpus import settled_workers
from pst_dist.config.schema import Config, EmbedConfig
from pst_dist.data.shard_tar import ShardInfo
from pst_dist.embedding.embed_shard import EmbeddedShard
from pst_dist.embedding.files import FolderFiles
from pst_dist.logs import Progress

FOLDER = sys.argv[1]

class Probe:
    def __init__(self, *_): pass
    def ready(self): pass
    def embed(self, shard):
        import ray
        Path(FOLDER, shard.name).write_text(json.dumps(ray.get_runtime_context().get_assigned_resources()))
        return EmbeddedShard(shard.name, 1, "", 1, 0, None, True)

if __name__ == "__main__":
    secure_local_cluster()
    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, object_store_memory=100 * 2**20,
             _temp_dir=sys.argv[2], log_to_driver=False)
    embed.EncoderActor = Probe
    shards = [ShardInfo(f"train-00000{k}.tar", "train", 1, 1, "0" * 64, 1) for k in range(3)]
    Path(sys.argv[1], "e").mkdir()
    files = FolderFiles(Path(sys.argv[1]), Path(sys.argv[1], "e"))
    embed.embed_with_ray(EmbedConfig(backend="ray"), {}, files, shards, lambda *_: None, Progress("embed", 3, "texts"))
    train = {"backend": "ray", "deepspeed": "zero1", "ray": {"num_workers": 2}}
    config = Config.model_validate({"output_dir": sys.argv[1] + "/run", "train": train})
    asked = settled_workers(config.train.ray, ray.cluster_resources())
    config = config.model_copy(update={"train": config.train.model_copy(update={"ray": asked})})
    class Orders: desk = None
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    scaling = _trainer(config, Orders()).scaling_config
    print(json.dumps([scaling.use_gpu, scaling.resources_per_worker]))
    ray.shutdown()
"""


@pytest.mark.parametrize(
    ("asked", "resources", "given"), [(None, WITH, 1), (None, WITHOUT, 0), (0, WITH, 0), (0.5, WITHOUT, 0.5)]
)
def test_a_worker_takes_a_gpu_where_there_is_one_unless_told_otherwise(asked, resources, given, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert gpus_each(asked, resources) == given
    assert settled_actors(RayConfig(num_gpus_per_actor=asked), resources).num_gpus_per_actor == given


def test_who_wants_the_cpu_gets_no_gpu(monkeypatch):
    assert settled_actors(RayConfig(), WITH, device="cpu").num_gpus_per_actor == 0
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert settled_workers(RayTrainConfig(), WITH).num_gpus_per_worker == 0


def test_more_workers_than_gpus_are_refused_with_the_way_to_the_cpu(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(
        EnvironmentFault, match=r"3 rank\(s\) of 1 CPU, 1 GPU each, but the cluster has 8 CPU, 2 GPU"
    ) as caught:
        check_room(RayTrainConfig(num_workers=3), WITH)
    assert "train.ray.num_gpus_per_worker=0 to train on CPUs" in caught.value.remedy
    check_room(RayTrainConfig(num_workers=3, num_gpus_per_worker=0), WITH)
    assert room_for(settled_actors(RayConfig(), WITH), WITH, "an actor", "ray") == 2


def test_a_device_that_is_not_here_is_refused_before_anything_starts(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(EnvironmentFault, match=f"device={name}, but torch finds no GPU"):
            check_encoder(EmbedConfig(device=name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda:1")
    with pytest.raises(EnvironmentFault, match=r"embed.device=cuda:2, but torch finds 2 GPU\(s\)"):
        check_device("cuda:2")
    with pytest.raises(ConfigError, match="is not a device"):
        check_device("gpu")
    check_device("cpu")


@pytest.mark.ray
def test_a_cluster_with_gpus_is_asked_for_them(tmp_path):
    """A real local cluster that believes in two GPUs."""
    environment = {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", "RAY_ADDRESS")}
    with tempfile.TemporaryDirectory(prefix="pst-") as short:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), short],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    given = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("train-*.tar"))]
    assert given == [{"CPU": 1.0, "GPU": 1.0}] * 3
    use_gpu, each = json.loads(done.stdout.splitlines()[-1])
    assert use_gpu is True and each == {"CPU": 1.0, "GPU": 1}
