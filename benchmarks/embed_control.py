"""What the driver of a Ray embedding costs by itself, to a hundred thousand shards: seconds, and memory, a shard.

    python benchmarks/embed_control.py [--shards 1000 10000 100000] [--actors 2] [--seconds 240] [--output FILE]

Everything is real but the encoding: `embed_all` itself, a real Ray cluster, real actor processes and messages, a file
for every shard, the manifest at the end. Only the actors look into no shard and encode nothing: they make an empty
file and answer at once with a summary of the true size (384 sums). The machine of the driver therefore does in
one run nothing but what the driver's side of a hundred thousand shards of any size would ask of it, with the actors'
processes beside it. Each size has a process of its own, so that peak memory is its own; the cluster is up before the
clock starts. `loop` is the same without Ray and without making files: listing, adding up, manifest. `again` is the same
command when all is complete. The files lie in memory where there is a /dev/shm. A size that would take longer than the
seconds left is named and left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

WIDTH = 384
NOTHING = hashlib.sha256(b"").hexdigest()


def make_shard_folder(directory: Path, count: int) -> None:
    """A manifest that promises `count` shards of 1000 texts, and an empty file for each."""
    from dataclasses import asdict

    from pst_dist.data.sample import SCHEMA_VERSION
    from pst_dist.data.shards import ShardInfo
    from pst_dist.storage.manifest import Manifest, write_manifest

    directory.mkdir(parents=True)
    infos = []
    for number in range(count):
        name = f"train-{number:06d}.tar"
        (directory / name).touch()
        infos.append(ShardInfo(name, "train", 1000, 500_000, hashlib.sha256(name.encode()).hexdigest(), 1000))
    files: dict[str, dict[str, Any]] = {i.name: {"bytes": i.bytes, "sha256": i.sha256} for i in infos}
    files |= {f"{i.stem}.index.json": {"bytes": 40_000, "sha256": i.sha256} for i in infos}
    table = [asdict(info) for info in infos]
    extra = {"schema_version": SCHEMA_VERSION, "counts": {"train": 1000 * count}, "shards": table}
    write_manifest(directory, Manifest("shards", "benchmark", files, extra))


def summary(shard: Any) -> Any:
    """What an actor would tell of a full shard, but that the file is empty."""
    import numpy as np

    from pst_dist.embedding.embed_shard import EmbeddedShard
    from pst_dist.embedding.files import file_name

    sums = np.full(WIDTH, 123_456_789, dtype=np.int64)
    return EmbeddedShard(file_name(shard), 0, NOTHING, 1000, 0, sums, encoded=True)


def measure(count: int, actors: int, backend: str) -> dict[str, Any]:
    """Wall and processor seconds, and memory, of one `embed_all` over `count` shards; of a second one too."""
    from measuring import forget_peak, resident_megabytes

    from pst_dist.clusters.ray import embed as on_ray
    from pst_dist.clusters.ray.connect import ray_cluster
    from pst_dist.config.schema import EmbedConfig, RayConfig
    from pst_dist.data.shards import ShardSet
    from pst_dist.embedding import embed
    from pst_dist.embedding.files import file_name

    class InstantActor(on_ray.EncoderActor):
        def __init__(self, config: Any, identity: Any, files: Any, driver: str) -> None:
            self._directory = files.embeddings

        def ready(self) -> None:
            pass

        def embed(self, shard: Any) -> Any:
            result = summary(shard)
            (self._directory / result.file).touch()
            return result

    identity = {"encoder": "instant", "dimension": WIDTH, "max_seq_length": 256}
    embed.TextEncoder = lambda config, device: SimpleNamespace(identity=identity)
    embed.embed_shard = lambda encoder, source, shard, target, advance: summary(shard)
    on_ray.EncoderActor = InstantActor
    executor = on_ray.embed_with_ray if backend == "ray" else None
    settings = RayConfig(num_actors=actors, num_cpus_per_actor=0.5)
    config = EmbedConfig(backend=backend, ray=settings)
    result: dict[str, Any] = {"shards": count, "backend": backend}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        base = Path(folder)
        make_shard_folder(base / "shards", count)
        (base / "embeddings").mkdir()
        for shard in ShardSet.open(base / "shards", verify=False).shards() if backend == "local" else ():
            (base / "embeddings" / file_name(shard)).touch()

        def work() -> None:
            for name in ("", "again_"):
                forget_peak()
                before, wall, cpu = resident_megabytes()[0], time.perf_counter(), time.process_time()
                embed.embed_all(
                    config, ShardSet.open(base / "shards", verify=False), base / "embeddings", executor=executor
                )
                result[f"{name}seconds"] = round(time.perf_counter() - wall, 2)
                result[f"{name}cpu_seconds"] = round(time.process_time() - cpu, 2)
                result[f"{name}memory_MiB"] = round(resident_megabytes()[1] - before, 1)

        if backend == "ray":
            with ray_cluster(settings):
                work()
        else:
            work()
        result["manifest_MiB"] = round((base / "embeddings" / "manifest.json").stat().st_size / 2**20, 1)
    return result


def main() -> None:
    """Measure every size in a process of its own, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--output", type=Path, default=Path("embed_control.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # Ray's 15 would measure the load of a busy machine
    if args.one:
        print(json.dumps(measure(args.shards[0], args.actors, args.one)))
        return
    import torch
    from measuring import machine

    from pst_dist.storage.manifest import write_json

    begin, rows = time.monotonic(), []
    for backend in ("ray", "loop"):
        pace, spent, last = 0.002, 0.0, 0  # a guess, until two sizes have been measured
        for count in sorted(args.shards):
            expected = spent + pace * (count - last)
            if expected > args.seconds - (time.monotonic() - begin):
                rows.append({"shards": count, "backend": backend, "left_out": f"about {expected:.0f} s"})
                continue
            started = time.monotonic()
            one = ["--one", "local" if backend == "loop" else "ray", "--actors", str(args.actors)]
            done = subprocess.run(
                [sys.executable, __file__, "--shards", str(count), *one], capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(done.stderr[-3000:])
            rows.append(json.loads(done.stdout.splitlines()[-1]) | {"backend": backend})
            spent, before = time.monotonic() - started, spent
            if before:  # what starting costs is in both
                pace = max(0.0, spent - before) / (count - last)
            last = count
    print(f"{'':5} {'shards':>8} {'s':>8} {'ms/shard':>9} {'cpu ms':>7} {'MiB':>7} {'KiB/shard':>10} {'again s':>8}")
    for row in rows:
        if "left_out" in row:
            print(f"{row['backend']:5} {row['shards']:8,} left out, would take {row['left_out']}")
            continue
        for field, name in (("seconds", "ms_per_shard"), ("cpu_seconds", "cpu_ms_per_shard")):
            row[name] = round(1000 * row[field] / row["shards"], 3)
        row["KiB_per_shard"] = round(1024 * row["memory_MiB"] / row["shards"], 2)
        print(
            f"{row['backend']:5} {row['shards']:8,} {row['seconds']:8.2f} {row['ms_per_shard']:9.3f} "
            f"{row['cpu_ms_per_shard']:7.3f} {row['memory_MiB']:7.1f} {row['KiB_per_shard']:10.2f} "
            f"{row['again_seconds']:8.2f}"
        )
    write_json(args.output, {"machine": machine(torch.device("cpu"), ("ray",)), "actors": args.actors, "rows": rows})


if __name__ == "__main__":
    main()
