"""What Ray promises: the bytes of the local backend, whole after an actor's death, nothing left behind.

One cluster serves the whole file: a first process starts it through `ray_cluster` and takes it down, a second one joins
it by address and embeds on it while an actor is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

import pst_dist
from pst_dist import ray_jobs
from pst_dist.config import EmbedConfig, RayConfig
from pst_dist.embeddings import embed_all
from pst_dist.errors import EnvironmentFault, PeerLostError
from pst_dist.progress import Progress
from pst_dist.ray_jobs import _number_of_actors
from pst_dist.schema import ReasoningSample
from pst_dist.shards import ShardSet, write_shards
from pst_dist.storage import sha256_file

REPOSITORY = Path(pst_dist.__file__).parents[1]

OWNER = """
import os, sys
from pathlib import Path
from pst_dist.config import EmbedConfig, RayConfig
from pst_dist.errors import PstError
from pst_dist.ray_cluster import ray_cluster
from pst_dist.ray_jobs import embed_with_ray
from pst_dist.shards import ShardSet

if __name__ == "__main__":
    base = Path(sys.argv[1])
    with ray_cluster(RayConfig()) as ray:
        folder = ray._private.worker._global_node.get_temp_dir_path()
        token = os.environ["RAY_AUTH_TOKEN_PATH"]
        print(ray.get_runtime_context().gcs_address, folder, token, oct(os.stat(token).st_mode), flush=True)
        sys.stdin.readline()
        shards = ShardSet.open(base / "shards")
        absent = EmbedConfig(encoder="/not/on/this/node", backend="ray")
        try:
            embed_with_ray(absent, shards, base / "no", shards.shards())
        except PstError as error:
            print(type(error).__name__, error, flush=True)
    print(ray.is_initialized(), Path(folder).exists(), flush=True)
"""

GUEST = """
import os, sys
from pathlib import Path
import sentence_transformers
from pst_dist.config import EmbedConfig, RayConfig
from pst_dist.embeddings import embed_all
from pst_dist.shards import ShardSet

if __name__ == "__main__":
    base = Path(sys.argv[1])
    address, token = sys.stdin.readline().split()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
    config = EmbedConfig(backend="ray", ray=RayConfig(address=address))
    embed_all(config, ShardSet.open(base / "shards"), base / "ray")
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    directory = tmp_path_factory.mktemp("ray") / "shards"
    train = [
        ReasoningSample(
            id=f"r{i}", question=f"q{i}", answer=str(i), rationales=(f"Take {i}, then double it. " * (1 + i % 5),)
        )
        for i in range(48)
    ]
    write_shards({"train": train[:42], "test": train[42:]}, directory, samples_per_shard=3, fingerprint="f", extra={})
    return ShardSet.open(directory)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(directory.glob("*.*")) if path.name != ".lock"}


def our_processes(mark: str) -> dict[int, str]:
    """Process id -> title of every live process that inherited `mark` in its environment: those of this test."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if f"PST_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            continue  # it ended, or is not ours to look at
    return found


def kill_an_encoder(mark: str, embeddings: Path, guest: subprocess.Popen) -> int:
    """SIGKILL one actor that is at work on a shard, once some but not all files are there; its process id."""
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and guest.poll() is None:
        files = len(list(embeddings.glob("*.safetensors")))
        busy = [pid for pid, title in our_processes(mark).items() if title == "ray::EncoderActor.embed"]
        if files >= 2 and busy:
            os.kill(busy[0], signal.SIGKILL)
            assert files < 14
            return busy[0]
        time.sleep(0.01)
    raise AssertionError("no actor was seen at work")


@pytest.fixture
def start(shards, tmp_path):
    """Start a script as a process with a home and a mark of its own; ends those still running after the test."""
    (tmp_path / "home").mkdir()
    started: list[subprocess.Popen] = []

    def start(name: str, script: str, mark: str) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"HOME": str(tmp_path / "home"), "PST_TEST_MARK": mark}
        environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        (tmp_path / f"{name}.py").write_text(script)
        with (tmp_path / f"{name}.log").open("w") as log:
            command = [sys.executable, tmp_path / f"{name}.py", shards.directory.parent]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            started.append(subprocess.Popen(command, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait()


@pytest.mark.ray
@pytest.mark.encoder
@pytest.mark.slow
def test_ray_gives_the_local_bytes_through_an_actors_death_and_leaves_nothing(shards, tmp_path, start):
    base, mark = shards.directory.parent, uuid.uuid4().hex
    owner, guest = start("owner", OWNER, mark), start("guest", GUEST, mark)
    line = owner.stdout.readline()
    assert line, (tmp_path / "owner.log").read_text()[-3000:]
    address, folder, token, mode = line.split()
    assert folder.startswith("/tmp/pst-ray-") and mode == "0o100600"
    guest.stdin.write(f"{address} {token}\n")
    guest.stdin.flush()
    victim = kill_an_encoder(mark, base / "ray", guest)
    guest.communicate(timeout=180)
    assert guest.returncode == 0, (tmp_path / "guest.log").read_text()[-3000:]

    embed_all(EmbedConfig(device="cpu"), shards, base / "local")
    local = digests(base / "local")
    assert len(local) == 16 + 2  # a file a shard, the mean, the manifest
    assert digests(base / "ray") == local, f"other bytes after actor {victim} was killed"

    output, _ = owner.communicate("go on\n", timeout=120)
    refused, ended = output.splitlines()
    assert refused == "InputError error[INPUT] /not/on/this/node: no such encoder folder; see embed.encoder"
    assert ended == "False False"  # disconnected, its folder gone
    assert not (tmp_path / "home" / ".ray").exists() and not Path(token).exists(), "a token was left behind"
    deadline = time.monotonic() + 20
    while our_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert our_processes(mark) == {}


@pytest.mark.ray
def test_a_cluster_that_does_not_answer_is_one_line_and_no_file(shards, tmp_path):
    config = EmbedConfig(device="cpu", backend="ray", ray=RayConfig(address="127.0.0.1:9"))
    from pst_dist.ray_jobs import embed_with_ray

    with pytest.raises(EnvironmentFault, match=r"no Ray cluster answers at 127\.0\.0\.1:9") as caught:
        embed_with_ray(config, shards, tmp_path / "e", shards.shards())
    assert "\n" not in str(caught.value) and not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("config", "resources", "shards", "expected"),
    [
        (RayConfig(), {"CPU": 4.0}, 100, 4),
        (RayConfig(), {"CPU": 4.0}, 3, 3),
        (RayConfig(num_actors=2), {"CPU": 4.0}, 100, 2),
        (RayConfig(num_actors=9), {"CPU": 4.0}, 100, 4),
        (RayConfig(num_cpus_per_actor=0.5), {"CPU": 4.0}, 100, 8),
        (RayConfig(num_gpus_per_actor=0.5), {"CPU": 64.0, "GPU": 2.0}, 100, 4),
    ],
)
def test_there_are_as_many_actors_as_fit(config, resources, shards, expected):
    assert _number_of_actors(config, resources, shards) == expected


@pytest.mark.parametrize(("device", "gpus", "expected"), [(None, 0, "cpu"), (None, 0.5, None), ("cuda:1", 0, None)])
def test_an_actor_without_a_gpu_of_its_own_encodes_on_the_cpu(monkeypatch, device, gpus, expected):
    asked = []
    monkeypatch.setattr(ray_jobs, "TextEncoder", lambda config, device: asked.append(device))
    config = EmbedConfig(device=device, backend="ray", ray=RayConfig(num_gpus_per_actor=gpus))
    ray_jobs.EncoderActor(config, "shards", "embeddings").ready()
    assert asked == [expected]


class OneCluster:
    """What `_share_out` asks of ray, for one actor: `finishes` says whether a wait yields, `outcome` what get gives."""

    def __init__(self, exceptions, finishes, outcome) -> None:
        self.exceptions, self.finishes, self.outcome = exceptions, finishes, outcome
        self.ready = self.embed = self

    def remote(self, *_):
        return object()

    def wait(self, futures, *, num_returns, timeout):
        assert timeout is not None, "would hang for ever"
        return (futures[:num_returns] if self.finishes.pop(0) else [], [])

    def get(self, future):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@pytest.mark.ray
def test_an_actor_that_ray_gives_up_for_want_of_memory_is_one_line(shards):
    import ray.exceptions

    cluster = OneCluster(ray.exceptions, [True], ray.exceptions.OutOfMemoryError("out of memory\nmore"))
    with pytest.raises(PeerLostError, match=r"lost while loading the encoder.*out of memory\)"):
        ray_jobs._share_out(cluster, [cluster], shards.shards()[:1], Progress("embed", 3, "texts"))


def test_a_silent_cluster_is_an_error_before_the_start_and_named_in_the_log_later(shards, caplog):
    bar = Progress("embed", 3, "texts")
    with pytest.raises(EnvironmentFault, match="no encoder actor started within 300 s"):
        cluster = OneCluster(None, [False], 0)
        ray_jobs._share_out(cluster, [cluster], shards.shards()[:1], bar)
    cluster = OneCluster(SimpleNamespace(RayTaskError=OSError, RayError=OSError), [True, False, True], 3)
    ray_jobs._share_out(cluster, [cluster], shards.shards()[:1], bar)
    (record,) = caplog.records
    assert shards.shards()[0].name in record.getMessage()


def test_a_cluster_without_room_says_what_it_lacks():
    with pytest.raises(EnvironmentFault, match="needs 1 CPU, 1 GPU, the cluster has 2 CPU, 0 GPU"):
        _number_of_actors(RayConfig(num_gpus_per_actor=1), {"CPU": 2.0}, 5)
