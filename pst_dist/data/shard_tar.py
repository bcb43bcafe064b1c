"""Write one shard as a tar file, and read it back strictly.

`read_shard` accepts exactly what `write_shard` writes. Standard tar readers stop silently at a damaged header and skip
members that are not files; a file that `read_shard` accepts contains every sample that was written. `shards` handles
directories, manifests and random access.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pst_dist.data.sample import ReasoningSample
from pst_dist.errors import DataError, InputError, IntegrityError
from pst_dist.storage.manifest import canonical_json
from pst_dist.storage.regular_files import open_regular

REMAKE = "run `pst shard --rebuild`"
_BLOCK = tarfile.BLOCKSIZE
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)
"""Two fields of a tar header."""


@dataclass(frozen=True)
class ShardInfo:
    """One row of the manifest's shard table."""

    name: str
    """File name, `train-000000.tar`."""
    split: str
    samples: int
    bytes: int
    sha256: str
    rationales: int | None = None
    """Total number of rationales of its samples. None in shards written before this column existed."""

    @property
    def stem(self) -> str:
        """The name without `.tar`; files derived from this shard use it."""
        return self.name.removesuffix(".tar")


@dataclass(frozen=True)
class ShardIndex:
    """Positions of the samples in one shard, in order. All lists have the same length."""

    ids: list[str]
    offsets: list[int]
    """First byte of the member's JSON in the tar."""
    sizes: list[int]
    rationales: list[int]
    """Number of rationales of each sample, so that (id, rationale) pairs are known without reading the sample."""


Member = tuple[str, bytes, int]
"""Id, content and number of rationales of a sample that is written."""


def members_of(samples: Iterable[ReasoningSample]) -> Iterator[Member]:
    """Samples as they are written. Half a surrogate pair is refused when it is."""
    for sample in samples:
        content = canonical_json(sample.to_json()).encode("utf-8", "surrogatepass")
        yield sample.id, content, len(sample.rationales)


def write_shard(path: Path, samples: Sequence[ReasoningSample]) -> WrittenShard:
    """`write_members` of samples."""
    return write_members(path, members_of(samples))


@dataclass(frozen=True)
class WrittenShard:
    """A tar that was written: what its index and the lists of shards say about it."""

    index: ShardIndex
    bytes: int
    sha256: str
    md5: str


def write_members(path: Path, members: Iterable[Member]) -> WrittenShard:
    """Write samples as one tar. The bytes do not depend on time, user or machine.

    The caller provides a private path (in a temporary directory) and is responsible for fsync. Raises DataError for
    text that cannot be stored, and for two samples of one name.
    """
    index, seen, offset = ShardIndex([], [], [], []), set[str](), 0
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("wb") as stream:

        def write(piece: bytes) -> None:
            stream.write(piece)
            sha256.update(piece)
            md5.update(piece)

        for name, content, count in members:
            _refuse_surrogates(name, content)
            if name in seen:
                raise DataError(f"two samples have the id {name!r}", "give each row a unique id, or none")
            seen.add(name)
            header, padding = _header(f"{name}.json", len(content)), bytes(-len(content) % _BLOCK)
            write(b"".join((header, content, padding)))
            index.ids.append(name)
            index.offsets.append(offset + len(header))
            index.sizes.append(len(content))
            index.rationales.append(count)
            offset += len(header) + len(content) + len(padding)
        end = bytes(2 * _BLOCK + -(offset + 2 * _BLOCK) % tarfile.RECORDSIZE)
        write(end)
    return WrittenShard(index, offset + len(end), sha256.hexdigest(), md5.hexdigest())


@functools.cache
def _blank_header() -> tuple[bytes, int]:
    """A header without name, size and checksum, and the checksum of its other bytes."""
    blank = tarfile.TarInfo()
    blank.mode, blank.mtime, blank.uname, blank.gname = 0o444, 0, "pst", "pst"
    made = bytearray(blank.tobuf(tarfile.PAX_FORMAT))
    made[_SIZE] = bytes(12)
    made[_CHECKSUM] = b" " * 8  # a checksum counts itself as spaces
    return bytes(made), sum(made)


def _header(name: str, size: int) -> bytes:
    """The header of a member, with the bytes that `tarfile` gives it, in a tenth of the time."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:
        member = tarfile.TarInfo(name)
        member.size, member.mode, member.mtime, member.uname, member.gname = size, 0o444, 0, "pst", "pst"
        return member.tobuf(tarfile.PAX_FORMAT)
    blank, rest = _blank_header()
    octal = b"%011o\0" % size
    checksum = b"%06o\0 " % (rest + sum(encoded) + sum(octal))
    name_field = encoded.ljust(100, b"\0")
    return b"".join((name_field, blank[100:124], octal, blank[136:148], checksum, blank[156:]))


def _refuse_surrogates(name: str, content: bytes) -> None:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        source = json.loads(content.decode("utf-8", "surrogatepass")).get("source")
        raise DataError(
            f"sample {name!r} contains a lone surrogate, which is not valid text", path=source or None
        ) from error


def read_shard(path: Path) -> list[ReasoningSample]:
    """All samples of one tar, in order.

    Raises IntegrityError for anything that `write_shard` would not have written, and InputError for a file that cannot
    be opened. The tar must consist of regular `<id>.json` files from its first byte to the closing zeros. Nothing is
    extracted to disk.
    """
    try:
        with open_regular(path, remedy="run `pst shard` first") as stream:
            samples = [parse_sample(content, f"{path}!{name}", name) for name, _, content in tar_members(stream, path)]
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", "run `pst shard` first", path=path) from error
    if not samples:
        raise IntegrityError("the shard has no samples", REMAKE, path=path)
    return samples


def tar_members(stream: BinaryIO, path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Yield (file name, byte offset of the content, content) for each member of a tar written by `write_shard`.

    Raises IntegrityError at the first deviation from that format. The closing zeros are checked after the last member,
    so the caller must exhaust the iterator.
    """

    def damaged(what: str) -> IntegrityError:
        return IntegrityError(what, REMAKE, path=path)

    data = stream.read()
    end, seen = 0, set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                header = data[member.offset : member.offset + _BLOCK]
                extended = member.offset_data - member.offset != _BLOCK
                # A name longer than 100 bytes needs one pax record, `path`. No other record is allowed.
                only_path = header[156:157] == b"x" and set(member.pax_headers) == {"path"}
                if not member.isreg() or member.issparse() or (extended and not only_path) or archive.pax_headers:
                    raise damaged(f"member {member.name!r} is not a plain file (type {header[156:157]!r})")
                if not re.fullmatch(r"[A-Za-z0-9_\-]{1,120}\.json", member.name):
                    raise damaged(f"member {member.name!r} is not <id>.json")
                if member.name in seen:
                    raise damaged(f"duplicate member {member.name!r}")
                if member.offset != end or not 0 <= member.size <= len(data) - member.offset_data:
                    raise damaged(f"member {member.name!r} is truncated or displaced")
                seen.add(member.name)
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                yield member.name, member.offset_data, data[member.offset_data : member.offset_data + member.size]
    except (tarfile.TarError, UnicodeError, ValueError) as error:
        raise damaged(f"not a tar file ({len(data)} bytes, starts with {data[:8]!r}): {error}") from error
    if len(data) - end < 2 * _BLOCK or data[end:].strip(b"\0"):
        raise damaged(f"damaged after byte {end} of {len(data)}")


def parse_sample(content: bytes, where: str, name: str | None = None) -> ReasoningSample:
    """Parse one member into a sample; raises IntegrityError that names `where` if it is not a valid sample."""

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs):
            raise ValueError("duplicate key")
        return row

    def no_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        row = json.loads(content.decode("utf-8"), object_pairs_hook=no_twins, parse_constant=no_constant)
        lists = [row.pop("rationales"), row.pop("choices")]
        turns = row.pop("turns", [])
        if not all(isinstance(values, list) for values in (*lists, turns, *turns)):
            raise ValueError("rationales, choices and turns are not lists")
        if not all(isinstance(value, str) for value in itertools.chain(row.values(), *lists, *turns)):
            raise ValueError("a value is not text")
        sample = ReasoningSample.from_json({**row, "rationales": lists[0], "choices": lists[1], "turns": turns})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, DataError) as error:
        raise IntegrityError(f"not a valid sample: {error}", REMAKE, path=where) from error
    if name is not None and name != f"{sample.id}.json":
        raise IntegrityError(f"contains the sample {sample.id!r} instead", REMAKE, path=where)
    return sample
