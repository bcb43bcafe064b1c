"""Rows per second of `write_shards` and of webdataset's own ShardWriter, on the same samples in memory.

    python benchmarks/shard_throughput.py [--rows 50000] [--rationales 1] [--rounds 5] [--output FILE]

This is the part of `pst shard` after its rows are read. The bare writer gets the same content as a dict, with the same
rows per shard, and writes only tars. pst_dist also refuses duplicate ids and text that cannot be stored, writes tars
whose bytes depend only on the samples, writes an index, a sha256 and a manifest, syncs the files to the disk and
publishes them all at once. `digests` is the bare writer and a sha256 of each tar, the least that a manifest needs.
Contenders take turns within a round, and ratios are taken within a round. Fails if a sample read from the bare writer's
tars differs from that of pst_dist.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import CLOCKS, compared, machine, paired_rounds

from pst_dist.data.sample import ReasoningSample
from pst_dist.data.shard_writer import write_shards
from pst_dist.data.shards import ShardSet
from pst_dist.storage.manifest import sha256_file, write_json

OURS = "pst_dist"


def make_samples(rows: int, rationales: int) -> list[ReasoningSample]:
    """Word problems with rationales as long as GSM8K's."""
    step = "After day {day} there are {left} + {day} = {sum} stamps in the album. "
    return [
        ReasoningSample(
            id=f"row-{row:08d}",
            question=f"An album holds {row} stamps. For {row % 6 + 1} days as many are added as the day's number. "
            "How many stamps are in the album at the end?",
            answer=str(row + (row % 6 + 1) * (row % 6 + 2) // 2),
            rationales=tuple(
                "".join(step.format(day=day, left=row + way, sum=row + way + day) for day in range(1, row % 6 + 2))
                for way in range(rationales)
            ),
        )
        for row in range(rows)
    ]


def write_ours(samples: list[ReasoningSample], folder: Path, per_shard: int) -> None:
    """A shard directory as `pst shard` writes it."""
    shutil.rmtree(folder, ignore_errors=True)
    write_shards({"train": samples}, folder, samples_per_shard=per_shard, fingerprint="benchmark", extra={})


def write_bare(samples: list[ReasoningSample], folder: Path, per_shard: int, *, digests: bool = False) -> None:
    """The tars of webdataset's ShardWriter, which encodes the JSON itself."""
    import webdataset

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / "train-%06d.tar"), maxcount=per_shard, verbose=0) as writer:
        for sample in samples:
            writer.write({"__key__": sample.id, "json": sample.to_json()})
    if digests:
        for path in sorted(folder.glob("*.tar")):
            sha256_file(path)


def check_equal(folder: Path, samples: list[ReasoningSample]) -> None:
    """Exit unless both directories hold the samples."""
    import webdataset

    urls = [str(path) for path in sorted((folder / "bare").glob("*.tar"))]
    bare = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    ours = ShardSet.open(folder / OURS).split("train")
    if [row["json"] for row in bare] != [one.to_json() for one in samples] or list(ours) != samples:
        raise SystemExit("the tars hold other samples")


def main() -> None:
    """Time all in turn, print the table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--rationales", type=int, default=1)
    parser.add_argument("--per-shard", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="cpu")
    parser.add_argument("--output", type=Path, default=Path("shard_throughput.json"))
    args = parser.parse_args()
    samples = make_samples(args.rows, args.rationales)
    with tempfile.TemporaryDirectory(prefix="pst-shards-") as temporary:
        folder = Path(temporary)
        contenders = {
            OURS: partial(write_ours, samples, folder / OURS, args.per_shard),
            "bare": partial(write_bare, samples, folder / "bare", args.per_shard),
            "digests": partial(write_bare, samples, folder / "digests", args.per_shard, digests=True),
        }
        for write in contenders.values():
            write()
        check_equal(folder, samples)
        seconds = paired_rounds(contenders, args.rounds, CLOCKS[args.clock])
        table: dict[str, Any] = compared(seconds, OURS)
        size = sum(path.stat().st_size for path in (folder / OURS).glob("*.tar"))
    print(f"{args.rows:,} rows, {size / 2**20:.0f} MiB of tars; {args.clock} seconds")
    print(f"{'':10}{'rows/s':>9}{'time over ours':>16}{'range':>17}")
    for name, row in table.items():
        row["rows_per_second"] = round(args.rows / row["seconds_median"])
        low, high = row["over_ours_min_max"]
        print(f"{name:10}{row['rows_per_second']:>9,}{row['over_ours']:>16}{f'{low} to {high}':>17}")
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    report = {"machine": machine(torch.device("cpu"), ("webdataset",)), "settings": settings, "bytes": size}
    write_json(args.output, report | {"results": table})


if __name__ == "__main__":
    main()
