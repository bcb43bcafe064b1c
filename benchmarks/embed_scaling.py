"""How embedding scales over Ray actors: 1, 2 and 4 of them against as many processes that know nothing of Ray.

    python benchmarks/embed_scaling.py [--counts 1 2 4] [--shards 12] [--texts 32] [--rounds 5] [--output FILE]

The ceiling of a machine is what it does when n processes, one thread each, encode the same shards with nothing between
them: they take the next number from a counter. Ray's actors are given the same shards by the very `Crew` that
`pst embed` has. Both load their encoders once, before any clock starts, and are timed from the first shard begun to
the last file written. Within a round each count is measured both ways, one after the other, the first one alternating,
and the ratio is taken per round; a busy machine hardly moves the median of such ratios. `efficiency` is that ratio: the
actors' texts per second over the processes'. `of one` is the actors' speed over one actor's in the same round, beside
the same for the processes. Real MiniLM, generated rationales. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from embed_throughput import make_texts

from pst_dist.clusters.ray import embed
from pst_dist.clusters.ray.connect import ray_cluster
from pst_dist.config.schema import EmbedConfig, RayConfig
from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shard_writer import write_shards
from pst_dist.data.shards import ShardInfo, ShardSet
from pst_dist.embedding.embed_shard import embed_shard
from pst_dist.embedding.encoder import TextEncoder
from pst_dist.embedding.files import FolderFiles
from pst_dist.logs import Progress

CONFIG = EmbedConfig(device="cpu")


class ClockedActor(embed.EncoderActor):
    """An actor that writes down when it began and ended a shard."""

    def embed(self, shard: ShardInfo) -> Any:
        begin = time.monotonic()
        result = super().embed(shard)
        clocked(self._files.embeddings, shard, begin)
        return result


def clocked(folder: Path, shard: ShardInfo, begin: float) -> None:
    """Write down when a shard was begun and ended, on the machine's clock."""
    (folder / f"{shard.stem}.clock").write_text(f"{begin} {time.monotonic()}")


def span(folder: Path, shards: int) -> float:
    """Seconds from the first begin to the last end; forgets what was made."""
    times = [tuple(map(float, path.read_text().split())) for path in folder.glob("*.clock")]
    assert len(times) == shards == len(list(folder.glob("*.safetensors")))
    for path in folder.iterdir():
        path.unlink()
    return max(end for _, end in times) - min(begin for begin, _ in times)


class Processes:
    """Processes that have nothing to do with each other but a counter; forks of this one, so the encoder loads once."""

    def __init__(self, files: FolderFiles, order: list[ShardInfo], encoder: TextEncoder, counts: list[int]) -> None:
        self._files, self._order, self._encoder = files, order, encoder
        context = multiprocessing.get_context("fork")
        self._begin = {n: context.Barrier(n) for n in counts}
        self._end = {n: context.Barrier(n + 1) for n in counts}  # and this process
        self._counter, self._orders = context.Value("i", 0), [context.Queue() for _ in range(max(counts))]
        for orders in self._orders:
            context.Process(target=self._encode_when_told, args=(orders,), daemon=True).start()

    def _encode_when_told(self, orders: Any) -> None:
        while count := orders.get():
            self._begin[count].wait()
            while True:
                with self._counter.get_lock():
                    number = self._counter.value
                    self._counter.value += 1
                if number >= len(self._order):
                    break
                begin, shard = time.monotonic(), self._order[number]
                with self._files.at_hand(shard) as (folder, target):
                    embed_shard(self._encoder, folder, shard, target)
                clocked(self._files.embeddings, shard, begin)
            self._end[count].wait()

    def seconds(self, count: int) -> float:
        """Seconds of the first `count` of them for all shards."""
        self._counter.value = 0
        for orders in self._orders[:count]:
            orders.put(count)
        self._end[count].wait()
        return span(self._files.embeddings, len(self._order))


class Actors:
    """Actors on a cluster, loaded once; a crew of the first n of them is what an embedding would have."""

    def __init__(self, ray: Any, files: FolderFiles, order: list[ShardInfo], identity: Any, counts: list[int]) -> None:
        self._ray, self._files, self._order = ray, files, order
        actor = ray.remote(num_cpus=min(1.0, ray.cluster_resources()["CPU"] / max(counts)))(ClockedActor)
        self._actors = [actor.remote(CONFIG, identity, files, "benchmark") for _ in range(max(counts))]
        with files.announced("benchmark"):
            ray.get([one.ready.remote() for one in self._actors])

    def seconds(self, count: int) -> float:
        """Seconds of the first `count` of them for all shards."""
        with self._files.announced("benchmark"):
            crew = embed.Crew(self._ray, iter(self._actors).__next__, count)
            crew.work(self._order, lambda shard, result: None, Progress("embed", None, "texts"))
        return span(self._files.embeddings, len(self._order))


def main() -> None:
    """Measure every count both ways in each round, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--texts", type=int, default=32, help="texts in each shard")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("embed_scaling.json"))
    args = parser.parse_args()
    # Ray gives its workers a niceness of 15: beside other people's work that would measure their load.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_worker_niceness": "0"}
    import torch
    from measuring import machine

    from pst_dist.storage.manifest import write_json

    torch.set_num_threads(1)

    seconds: dict[tuple[str, int], list[float]] = {}
    texts = make_texts(args.shards * args.texts, repeats=0.0)
    rows = [ReasoningSample(id=f"r{i}", question="q", answer="a", rationales=(text,)) for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        base = Path(temporary)
        write_shards({"train": rows}, base / "shards", samples_per_shard=args.texts, fingerprint="f", extra={})
        files = FolderFiles(base / "shards", base / "embeddings")
        files.embeddings.mkdir()
        order = sorted(ShardSet.open(files.shards).shards(), key=lambda shard: (-shard.bytes, shard.name))
        encoder = TextEncoder(CONFIG)
        processes = Processes(files, order, encoder, args.counts)  # before Ray, whose threads no fork survives
        ray = stack.enter_context(ray_cluster(RayConfig()))
        ways = {
            "actors": Actors(ray, files, order, encoder.identity, args.counts).seconds,
            "processes": processes.seconds,
        }
        for number in range(args.rounds):
            for count in args.counts if number % 2 == 0 else reversed(args.counts):
                for way in ways if number % 2 == 0 else reversed(ways):
                    seconds.setdefault((way, count), []).append(ways[way](count))
    table, one = [], args.counts[0]
    for count in args.counts:
        ours, theirs = seconds["actors", count], seconds["processes", count]
        ratios = [ceiling / taken for ceiling, taken in zip(theirs, ours, strict=True)]
        row = {
            "actors": count,
            "texts_per_second": round(statistics.median(len(texts) / s for s in ours), 1),
            "ceiling_texts_per_second": round(statistics.median(len(texts) / s for s in theirs), 1),
            "efficiency": round(statistics.median(ratios), 3),
            "efficiency_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        }
        for name, way in (("of_one", "actors"), ("ceiling_of_one", "processes")):
            pairs = zip(seconds[way, one], seconds[way, count], strict=True)
            row[name] = round(statistics.median(first / these for first, these in pairs), 2)
        table.append(row)
    print("actors  texts/s  ceiling efficiency    (min    max)  of one  ceiling of one")
    for row in table:
        low, high = row["efficiency_min_max"]
        print(
            f"{row['actors']:6} {row['texts_per_second']:8.1f} {row['ceiling_texts_per_second']:8.1f} "
            f"{row['efficiency']:10.3f} {low:7.3f} {high:7.3f} {row['of_one']:7.2f} {row['ceiling_of_one']:15.2f}"
        )
    record = {"machine": machine(torch.device("cpu"), ("ray",)), "cores": len(os.sched_getaffinity(0))}
    settings = {"rounds": args.rounds, "texts": len(texts), "shards": args.shards}
    write_json(args.output, record | settings | {"results": table})


if __name__ == "__main__":
    main()
