"""What Ray promises: the local backend's bytes through the death of actor, node and driver, and nothing left behind.

Two clusters serve the whole file. The first is started through `ray_cluster` by one process, and a second one joins it
by address and embeds on it while an actor is killed. The other one has nodes that can be killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import pst_dist
from pst_dist.clusters.ray import connect, embed
from pst_dist.clusters.ray.crew import Crew, number_of_actors
from pst_dist.config.schema import EmbedConfig, RayConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shard_writer import write_shards
from pst_dist.data.shards import ShardSet
from pst_dist.embedding.embed import embed_all
from pst_dist.embedding.embed_shard import EmbeddedShard
from pst_dist.embedding.files import FolderFiles
from pst_dist.errors import EnvironmentFault, IntegrityError, PeerLostError
from pst_dist.logs import Progress
from pst_dist.storage.manifest import sha256_file

REPOSITORY = Path(pst_dist.__file__).parents[1]

OWNER = """
import os, sys
from pathlib import Path
from pst_dist.config.schema import EmbedConfig, RayConfig
from pst_dist.embedding.files import FolderFiles
from pst_dist.errors import PstError
from pst_dist.logs import Progress
from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.clusters.ray.embed import embed_with_ray
from pst_dist.data.shards import ShardSet

if __name__ == "__main__":
    base = Path(sys.argv[1])
    with ray_cluster(RayConfig()) as ray:
        folder = ray._private.worker._global_node.get_temp_dir_path()
        token = os.environ["RAY_AUTH_TOKEN_PATH"]
        print(ray.get_runtime_context().gcs_address, folder, token, oct(os.stat(token).st_mode), flush=True)
        sys.stdin.readline()
        shards = ShardSet.open(base / "shards")
        absent, bar = EmbedConfig(encoder="/not/on/this/node", backend="ray"), Progress("embed", 3, "texts")
        try:
            embed_with_ray(absent, {}, FolderFiles(base / "shards", base / "no"), shards.shards(), print, bar)
        except PstError as error:
            print(type(error).__name__, error, flush=True)
    print(ray.is_initialized(), Path(folder).exists(), flush=True)
"""

GUEST = """
import os, sys
from pathlib import Path
import sentence_transformers
from pst_dist.config.schema import EmbedConfig, RayConfig
from pst_dist.clusters.ray.embed import embed_with_ray
from pst_dist.embedding.embed import embed_all
from pst_dist.data.shards import ShardSet

if __name__ == "__main__":
    base = Path(sys.argv[1])
    address, token = sys.stdin.readline().split()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
    config = EmbedConfig(backend="ray", ray=RayConfig(address=address))
    embed_all(config, ShardSet.open(base / "shards"), base / "ray", executor=embed_with_ray)
"""

NODES = """
import os, sys
from pst_dist.clusters.ray.connect import secure_local_cluster

if __name__ == "__main__":
    secure_local_cluster()
    from ray.cluster_utils import Cluster
    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **small)
    print(cluster.address, os.environ["RAY_AUTH_TOKEN_PATH"], flush=True)
    sys.stdin.readline()
    cluster.shutdown()
"""

DRIVER = """
import logging, os, sys, time
from pathlib import Path
from pst_dist.clusters.ray import embed as ray_jobs
from pst_dist.config.schema import EmbedConfig, RayConfig
from pst_dist.clusters.ray.embed import embed_with_ray
from pst_dist.embedding.embed import embed_all
from pst_dist.data.shards import ShardSet

BASE, DIARY = Path(sys.argv[1]), Path(sys.argv[1]) / sys.argv[2]

class Diarist(ray_jobs.EncoderActor):
    def note(self, word, shard):
        with DIARY.open("a") as stream:
            stream.write(f"{word} {shard.name} {os.getpid()}\\n")

    def embed(self, shard):
        self.note("begin", shard)
        time.sleep(0.5)
        result = super().embed(shard)
        self.note("encoded" if result.encoded else "current", shard)
        return result

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    address, token = sys.stdin.readline().split()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
    ray_jobs.EncoderActor = Diarist
    config = EmbedConfig(backend="ray", ray=RayConfig(address=address))
    embed_all(config, ShardSet.open(BASE / "shards"), BASE / "nodes", executor=embed_with_ray)
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


@pytest.fixture(scope="module")
def local(shards) -> dict[str, str]:
    """Digests of what one process makes of these shards."""
    embed_all(EmbedConfig(device="cpu"), shards, shards.directory.parent / "local")
    found = digests(shards.directory.parent / "local")
    assert len(found) == 16 + 2  # a file a shard, the mean, the manifest
    return found


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
    deadline = time.monotonic() + 300
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
    # The nodes' sockets lie there, whose paths must be short; and no cluster of the user's is to hear of ours.
    ray_folder = tempfile.mkdtemp(prefix="pst-test-", dir="/tmp")

    def start(name: str, script: str, mark: str, *arguments: str) -> subprocess.Popen:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"HOME": str(tmp_path / "home"), "PST_TEST_MARK": mark}
        environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "RAY_TMPDIR": ray_folder}
        environment |= {"RAY_worker_niceness": "0"}  # Ray's 15 would leave actors little of a busy machine
        (tmp_path / f"{name}.py").write_text(script)
        with (tmp_path / f"{name}.log").open("w") as log:
            command = [sys.executable, tmp_path / f"{name}.py", shards.directory.parent, *arguments]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            started.append(subprocess.Popen(command, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait()
    shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.encoder
@pytest.mark.slow
@pytest.mark.timeout(1200)  # its own limits end it, on a busy machine too
def test_ray_gives_the_local_bytes_through_an_actors_death_and_leaves_nothing(shards, local, tmp_path, start):
    base, mark = shards.directory.parent, uuid.uuid4().hex
    owner, guest = start("owner", OWNER, mark), start("guest", GUEST, mark)
    line = owner.stdout.readline()
    assert line, (tmp_path / "owner.log").read_text()[-3000:]
    address, folder, token, mode = line.split()
    assert folder.startswith("/tmp/pst-ray-") and mode == "0o100600"
    guest.stdin.write(f"{address} {token}\n")
    guest.stdin.flush()
    victim = kill_an_encoder(mark, base / "ray", guest)
    guest.communicate(timeout=300)
    assert guest.returncode == 0, (tmp_path / "guest.log").read_text()[-3000:]

    assert digests(base / "ray") == local, f"other bytes after actor {victim} was killed"

    output, _ = owner.communicate("go on\n", timeout=120)
    refused, ended = output.splitlines()
    assert refused == "InputError error[INPUT] /not/on/this/node: no such encoder folder; check embed.encoder"
    assert list((base / "no").iterdir()) == []
    assert ended == "False False"  # disconnected, its folder gone
    assert not (tmp_path / "home" / ".ray").exists() and not Path(token).exists(), "a token was left behind"
    deadline = time.monotonic() + 20
    while our_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert our_processes(mark) == {}


def written(directory: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again, even with the same bytes."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.glob("*.safetensors")}


def wait_until(true, what: str, process: subprocess.Popen | None = None, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        assert process is None or process.poll() is None, f"it ended before: {what}"
        time.sleep(0.02)


def diary(path: Path) -> dict[str, list[str]]:
    """Word -> names of shards, in the order in which the actors wrote them down."""
    entries: dict[str, list[str]] = {"begin": [], "encoded": [], "current": []}
    for line in path.read_text().splitlines() if path.exists() else []:
        word, name, _ = line.split()
        entries[word].append(name)
    return entries


def encoders(mark: str) -> list[int]:
    """Process ids of the live actors."""
    return [pid for pid, title in our_processes(mark).items() if title.startswith("ray::Diarist")]


def cut_the_power(actor: int) -> None:
    """SIGKILL the node of an actor: its raylet, and then all that the raylet had started."""
    raylet = parent(actor)
    assert Path(f"/proc/{raylet}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/raylet")
    everything = [raylet, *(int(e.name) for e in Path("/proc").iterdir() if e.name.isdigit() and parent(e) == raylet)]
    for pid in everything:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def parent(process: int | Path) -> int:
    try:
        return int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


@pytest.mark.ray
@pytest.mark.encoder
@pytest.mark.slow
@pytest.mark.timeout(1200)  # its own limits end it, on a busy machine too
def test_the_death_of_driver_and_node_loses_nothing_and_repeats_little(shards, local, tmp_path, start):
    base, mark = shards.directory.parent, uuid.uuid4().hex
    made, log = base / "nodes", tmp_path / "second.log"
    nodes = start("nodes", NODES, mark)
    line = nodes.stdout.readline()
    assert line, (tmp_path / "nodes.log").read_text()[-3000:]

    def embed(name: str) -> subprocess.Popen:
        driver = start(name, DRIVER, mark + name, f"{name}.diary")
        driver.stdin.write(line)
        driver.stdin.flush()
        return driver

    first = embed("first")
    wait_until(lambda: len(list(made.glob("*.safetensors"))) >= 3, "three files", first)
    first.kill()
    first.wait()
    wait_until(lambda: not encoders(mark), "the actors of a dead driver end")
    finished, begun = written(made), diary(base / "first.diary")["begin"]
    assert 3 <= len(finished) < 10 and not (made / "manifest.json").exists()
    assert len(begun) - len(finished) <= 2  # one at work on each actor

    second = embed("second")
    wait_until(lambda: len(written(made)) >= len(finished) + 2, "two files more", second)
    cut_the_power(encoders(mark)[0])
    second.communicate(timeout=300)
    assert second.returncode == 0, log.read_text()[-3000:]
    assert digests(made) == local
    assert {name: written(made)[name] for name in finished} == finished
    entries = diary(base / "second.diary")
    assert {name.replace(".tar", ".safetensors") for name in entries["current"]} >= finished.keys()
    assert len(entries["begin"]) - 16 <= 2, "a lost actor holds two shards at most"
    assert "an encoder actor was lost at" in log.read_text()
    assert not [path for path in made.iterdir() if path.name.startswith(".") and path.name != ".lock"]

    nodes.communicate("end\n", timeout=120)
    wait_until(lambda: not our_processes(mark), "the cluster ends", seconds=60)


def test_what_a_killed_process_left_goes_and_what_a_live_one_holds_stays(tmp_path):
    held = (
        "import sys; from pst_dist.clusters.ray import connect as r; print(r._folder(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", held], stdin=-1, stdout=-1, text=True) as process:
        folder = Path(process.stdout.readline().strip())
        connect._sweep([folder / ".owner"])
        assert folder.is_dir()
        process.kill()
    connect._sweep([folder / ".owner"])
    assert not folder.exists()
    (tmp_path / "token").touch()
    connect._sweep([tmp_path / "token"])
    assert not (tmp_path / "token").exists()


@pytest.mark.ray
def test_a_cluster_that_does_not_answer_is_one_line_and_no_file(shards, tmp_path):
    config = EmbedConfig(device="cpu", backend="ray", ray=RayConfig(address="127.0.0.1:9"))
    from pst_dist.clusters.ray.embed import embed_with_ray

    with pytest.raises(EnvironmentFault, match=r"no Ray cluster answers at 127\.0\.0\.1:9") as caught:
        bar = Progress("embed", 3, "texts")
        embed_with_ray(config, {}, FolderFiles(shards.directory, tmp_path / "e"), shards.shards(), print, bar)
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
    assert number_of_actors(config, resources, shards, embed._WORDS, "embed.ray") == expected


@pytest.mark.parametrize(("device", "gpus", "expected"), [(None, 0, "cpu"), (None, 0.5, None), ("cuda:1", 0, None)])
def test_an_actor_without_a_gpu_of_its_own_encodes_on_the_cpu(monkeypatch, tmp_path, device, gpus, expected):
    asked = []
    encoder = SimpleNamespace(identity={"encoder": "e"})
    monkeypatch.setattr(embed, "TextEncoder", lambda config, device: asked.append(device) or encoder)
    (tmp_path / ".driver").write_text("me")
    config = EmbedConfig(device=device, backend="ray", ray=RayConfig(num_gpus_per_actor=gpus))
    embed.EncoderActor(config, encoder.identity, FolderFiles(Path("shards"), tmp_path), "me").ready()
    assert asked == [expected]


def test_an_actor_with_another_encoder_or_another_disk_refuses_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(embed, "TextEncoder", lambda config, device: SimpleNamespace(identity={"encoder": "mine"}))
    config, folders = EmbedConfig(backend="ray"), FolderFiles(Path("shards"), tmp_path)
    with pytest.raises(IntegrityError, match="differs: encoder 'mine', wanted 'yours'; every machine needs the same"):
        embed.EncoderActor(config, {"encoder": "yours"}, folders, "me").ready()
    for found in (None, "another driver"):
        if found is not None:
            (tmp_path / ".driver").write_text(found)
        with pytest.raises(EnvironmentFault, match="does not see the driver's files in this folder; put data_dir on"):
            embed.EncoderActor(config, {"encoder": "mine"}, folders, "me").ready()


class OneActor:
    """What a `Crew` asks of ray, with one actor: `finishes` says whether a wait yields, `outcomes` what get gives."""

    def __init__(self, finishes, outcomes) -> None:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.finishes, self.outcomes, self.hired = finishes, outcomes, 0
        self.ready = self.embed = self

    def hire(self):
        self.hired += 1
        return self

    def remote(self, *_):
        return object()

    def wait(self, calls, *, num_returns, timeout):
        assert timeout is not None, "would hang for ever"
        return (calls[:num_returns] if not self.finishes or self.finishes.pop(0) else [], [])

    def get(self, call):
        outcome = self.outcomes.pop(0)
        if outcome == "lost":
            raise self.exceptions.RayError("out of memory\nmore")
        return outcome

    def kill(self, actor):
        pass


def one_done() -> EmbeddedShard:
    return EmbeddedShard("f", 1, "s", 3, 0, np.zeros(2, np.int64), encoded=True)


def work(cluster: OneActor, shards: list, told: list) -> None:
    crew = Crew(
        cluster,
        cluster.hire,
        1,
        embed._WORDS,
        call=lambda handle, shard: handle.embed.remote(shard),
        name_of=lambda shard: shard.name,
    )
    crew.work(shards, lambda shard, result: told.append(shard.name), Progress("embed", 3, "texts"))


@pytest.mark.parametrize(
    ("starts", "where", "most"), [(False, "while loading the encoder", 6), (True, "at test-000000.tar", 5)]
)
def test_an_actor_that_dies_again_and_again_is_one_line(shards, starts, where, most):
    cluster = OneActor([], [None, "lost"] * most if starts else ["lost"] * most)
    with pytest.raises(PeerLostError, match=rf"lost {most} times {where} \(out of memory\)"):
        work(cluster, shards.shards()[:1], [])
    assert cluster.hired == most and not cluster.outcomes


def test_what_a_lost_actor_held_is_done_by_another_and_told_once(shards):
    told: list[str] = []
    # Two shards are held when it dies; its successor is ready and does all three.
    cluster = OneActor([], [None, one_done(), "lost", None, one_done(), one_done()])
    work(cluster, shards.shards()[:3], told)
    assert told == [shard.name for shard in shards.shards()[:3]] and cluster.hired == 2


def test_a_silent_cluster_is_an_error_before_the_start_and_named_in_the_log_later(shards, caplog):
    with pytest.raises(EnvironmentFault, match="no encoder actor started within 300 s"):
        work(OneActor([False], []), shards.shards()[:1], [])
    work(OneActor([True, False, True], [None, one_done()]), shards.shards()[:1], [])
    (record,) = caplog.records
    assert shards.shards()[0].name in record.getMessage()


def test_a_cluster_without_room_says_what_it_lacks():
    with pytest.raises(EnvironmentFault, match="needs 1 CPU, 1 GPU, the cluster has 2 CPU, 0 GPU"):
        number_of_actors(RayConfig(num_gpus_per_actor=1), {"CPU": 2.0}, 5, embed._WORDS, "embed.ray")
