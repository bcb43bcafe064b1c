"""How embedding scales over Ray actors: 1, 2 and 4 of them against as many processes that know nothing of Ray.

    python benchmarks/embed_scaling.py [--counts 1 2 4] [--shards 16] [--texts 48] [--rounds 5] [--output FILE]

The ceiling of a machine is what it does when n processes, one thread each, encode the same shards with nothing between
them: they take the next number from a counter. Ray's actors are timed over the same span: from when all n encoders
are loaded to when the last file is there. Within a round each count is measured both ways, one after the other, the
first one alternating, and the ratio is taken per round; a busy machine hardly moves the median of such ratios.
`efficiency` is that ratio: the actors' texts per second over the processes'. `of one` is the actors' speed over one
actor's in the same round, to be read beside `ceiling of one`, the same for the processes. Real MiniLM, generated
rationales. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from embed_throughput import make_texts

from pst_dist import ray_jobs
from pst_dist.config import EmbedConfig, RayConfig
from pst_dist.embeddings import embed_all, embed_shard, file_name
from pst_dist.encoder import TextEncoder
from pst_dist.ray_cluster import ray_cluster
from pst_dist.schema import ReasoningSample
from pst_dist.shards import ShardSet, write_shards

CONFIG = EmbedConfig(device="cpu")


class ClockedActor(ray_jobs.EncoderActor):
    """An actor that waits until all are loaded, and writes down when it began and ended a shard."""

    def ready(self) -> None:
        super().ready()
        place = self._directory.parent / "loaded"
        place.mkdir(exist_ok=True)
        (place / str(os.getpid())).touch()
        while len(list(place.iterdir())) < (self._config.ray.num_actors or 1):
            time.sleep(0.01)

    def embed(self, shard: Any) -> Any:
        begin = time.monotonic()
        result = super().embed(shard)
        clocked(self._directory.parent, shard.stem, begin)
        return result


def clocked(folder: Path, name: str, begin: float) -> None:
    """Write down when a shard was begun and ended, on the machine's clock."""
    (folder / f"{name}.clock").write_text(f"{begin} {time.monotonic()}")


def span(folder: Path) -> float:
    """Seconds from the first begin to the last end."""
    times = [tuple(map(float, path.read_text().split())) for path in folder.glob("*.clock")]
    return max(end for _, end in times) - min(begin for begin, _ in times)


def with_actors(shards: ShardSet, count: int, cores: float, folder: Path) -> float:
    """Seconds of `count` actors, through the very function that `pst embed` calls."""
    settings = RayConfig(num_actors=count, num_cpus_per_actor=min(1.0, cores / count))
    embed_all(CONFIG.model_copy(update={"backend": "ray", "ray": settings}), shards, folder / "embeddings")
    return span(folder)


def with_processes(shards: ShardSet, count: int, folder: Path) -> float:
    """Seconds of `count` processes that have nothing to do with each other but a counter."""
    context = multiprocessing.get_context("spawn")
    barrier, counter = context.Barrier(count), context.Value("i", 0)
    arguments = (shards.directory, folder, barrier, counter)
    processes = [context.Process(target=_encode_shards, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            sys.exit(f"a process ended with {process.exitcode}")
    return span(folder)


def _encode_shards(directory: Path, folder: Path, barrier: Any, counter: Any) -> None:
    import torch

    torch.set_num_threads(1)
    encoder = TextEncoder(CONFIG)
    shards = sorted(ShardSet.open(directory, verify=False).shards(), key=lambda shard: (-shard.bytes, shard.name))
    (folder / "embeddings").mkdir(parents=True, exist_ok=True)
    barrier.wait()
    while True:
        with counter.get_lock():
            number = counter.value
            counter.value += 1
        if number >= len(shards):
            return
        begin, shard = time.monotonic(), shards[number]
        embed_shard(encoder, directory, shard, folder / "embeddings" / file_name(shard))
        clocked(folder, shard.stem, begin)


def main() -> None:
    """Measure every count both ways in each round, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--texts", type=int, default=48, help="texts in each shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("embed_scaling.json"))
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from measuring import machine

    from pst_dist.storage import write_json

    ray_jobs.EncoderActor = ClockedActor  # type: ignore[misc]
    cores = len(os.sched_getaffinity(0))
    seconds: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary, ray_cluster(RayConfig()):
        base = Path(temporary)
        texts = make_texts(args.shards * args.texts, repeats=0.0)
        rows = [ReasoningSample(id=f"r{i}", question="q", answer="a", rationales=(t,)) for i, t in enumerate(texts)]
        write_shards({"train": rows}, base / "s", samples_per_shard=args.texts, fingerprint="f", extra={})
        shards = ShardSet.open(base / "s")
        for number in range(args.rounds):
            for count in args.counts if number % 2 == 0 else reversed(args.counts):
                for way in ("actors", "processes") if number % 2 == 0 else ("processes", "actors"):
                    folder = base / "work"
                    folder.mkdir()
                    taken = (
                        with_actors(shards, count, cores, folder)
                        if way == "actors"
                        else with_processes(shards, count, folder)
                    )
                    seconds.setdefault((way, count), []).append(taken)
                    shutil.rmtree(folder)
    table = []
    one = args.counts[0]
    for count in args.counts:
        actors, processes = seconds["actors", count], seconds["processes", count]
        ratios = [theirs / ours for theirs, ours in zip(processes, actors, strict=True)]
        row = {
            "actors": count,
            "texts_per_second": round(statistics.median(len(texts) / s for s in actors), 1),
            "ceiling_texts_per_second": round(statistics.median(len(texts) / s for s in processes), 1),
            "efficiency": round(statistics.median(ratios), 3),
            "efficiency_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        }
        for name, way in (("of_one", "actors"), ("ceiling_of_one", "processes")):
            first = seconds[way, one]
            row[name] = round(statistics.median(a / b for a, b in zip(first, seconds[way, count], strict=True)), 2)
        table.append(row)
    print(
        f"{'actors':>6} {'texts/s':>8} {'ceiling':>8} {'efficiency':>10} {'(min max)':>15} {'of one':>7} {'ceiling':>8}"
    )
    for row in table:
        low, high = row["efficiency_min_max"]
        print(
            f"{row['actors']:6} {row['texts_per_second']:8.1f} {row['ceiling_texts_per_second']:8.1f} "
            f"{row['efficiency']:10.3f} {low:7.3f} {high:7.3f} {row['of_one']:7.2f} {row['ceiling_of_one']:15.2f}"
        )
    record = {"machine": machine(torch.device("cpu"), ("ray",)), "cores": cores, "rounds": args.rounds}
    write_json(args.output, record | {"texts": len(texts), "shards": args.shards, "results": table})


if __name__ == "__main__":
    main()
