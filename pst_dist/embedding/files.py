"""Where embedding files are stored while they are being written: a folder that every machine sees, or object storage.

Both classes have the interface used by `embedding.embed` and by the actors of `clusters.ray.embed`, and both are small
values that can be sent to an actor. With object storage an actor fetches its shard and uploads its file through a
temporary folder, so that no machine has to hold everything. `embedding.vector_file` defines the contents of a file;
`storage.object_store` moves files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pst_dist.data.shards import ShardInfo
from pst_dist.errors import EnvironmentFault
from pst_dist.storage.artefact import Artefact
from pst_dist.storage.atomic import write_text
from pst_dist.storage.leftovers import final_name, remove_leftovers
from pst_dist.storage.manifest import MANIFEST, Manifest, sha256_file
from pst_dist.storage.object_store import RemoteFolder

log = logging.getLogger(__name__)

_DRIVER = ".driver"  # a file of the driver, by which an actor verifies that it sees the same folder


def file_name(shard: ShardInfo) -> str:
    """Name of a shard's embedding file."""
    return f"{shard.stem}.safetensors"


@dataclass(frozen=True)
class FolderFiles:
    """Shards and embeddings in two folders."""

    shards: Path
    embeddings: Path

    @property
    def where(self) -> str:
        """For messages."""
        return str(self.embeddings)

    def manifest(self) -> Manifest | None:
        """That of finished embeddings, else None."""
        return Artefact(self.embeddings, "embeddings").manifest()

    def finished(self, fingerprint: str) -> Manifest | None:
        """The manifest of complete embeddings made from these inputs; otherwise None."""
        return Artefact(self.embeddings, "embeddings", remembers=True).finished(fingerprint)

    def remove_leftovers(self) -> None:
        """Remove the temporary files of killed runs; the caller holds the lock."""
        for kind in ("*.safetensors", MANIFEST):
            remove_leftovers(self.embeddings, kind, locked=True)

    def names(self) -> set[str]:
        """Names of all files there now."""
        return {entry.name for entry in os.scandir(self.embeddings)}

    def remove(self, name: str) -> None:
        """Delete a file; a missing one is not an error."""
        (self.embeddings / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def at_hand(self, shard: ShardInfo) -> Iterator[tuple[Path, Path]]:
        """(folder of the shard's tar, path of its embedding file); a file written to the path is kept."""
        yield self.shards, self.embeddings / file_name(shard)

    def keep(self, names: list[str], write: Callable[[Path], None]) -> None:
        """Have `write` write these files into a folder, and keep them."""
        write(self.embeddings)

    @contextlib.contextmanager
    def announced(self, driver: str) -> Iterator[None]:
        """During this block, actors can recognise this folder by the driver's name."""
        write_text(self.embeddings / _DRIVER, driver)
        try:
            yield
        finally:
            (self.embeddings / _DRIVER).unlink(missing_ok=True)

    def for_actor(self) -> FolderFiles:
        """The same files, for a process with another working directory."""
        return FolderFiles(self.shards.resolve(), self.embeddings.resolve())

    def check(self, driver: str) -> None:
        """Raise EnvironmentFault when this machine does not see the driver's folder."""
        mark = self.embeddings / _DRIVER
        if not mark.is_file() or mark.read_text() != driver:
            raise EnvironmentFault(
                f"{platform.node()} does not see the driver's files in this folder",
                "put data_dir on storage that all machines of the cluster share",
                path=self.embeddings,
            )


@dataclass(frozen=True)
class RemoteFiles:
    """Shards and embeddings behind a URL."""

    data: RemoteFolder
    mirror: Path | None
    """A local folder with copies of `shards` and `embeddings`; None keeps no copies here."""

    @property
    def where(self) -> str:
        """For messages."""
        return self._embeddings.url

    @property
    def _embeddings(self) -> RemoteFolder:
        return self.data.child("embeddings")

    def manifest(self) -> Manifest | None:
        """That of finished embeddings, else None."""
        return self._embeddings.manifest("embeddings")

    def finished(self, fingerprint: str) -> Manifest | None:
        """The same; checks only that all files exist, since fetching a file compares its digest."""
        manifest = self.manifest()
        if manifest is None or manifest.fingerprint != fingerprint or not manifest.files.keys() <= self.names():
            return None
        return manifest

    def remove_leftovers(self) -> None:
        """The same, for the local mirror and for a folder behind `file://`."""
        if self.mirror is not None:
            remove_leftovers(self.mirror / "embeddings", locked=True)
        for name in self.names():
            if name.startswith(".") and (final_name(name) or "").endswith((".safetensors", MANIFEST)):
                self.remove(name)

    def names(self) -> set[str]:
        """Names of all files there now."""
        return self._embeddings.names()

    def remove(self, name: str) -> None:
        """Delete a file locally and in the storage; a missing one is not an error."""
        if self.mirror is not None:
            (self.mirror / "embeddings" / name).unlink(missing_ok=True)
        self._embeddings.remove(name)

    @contextlib.contextmanager
    def at_hand(self, shard: ShardInfo) -> Iterator[tuple[Path, Path]]:
        """(folder of the shard's tar, path of its embedding file), both fetched; a new embedding file is uploaded."""
        with contextlib.ExitStack() as stack:
            here = self.mirror or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pst-embed-")))
            tar, target = here / "shards" / shard.name, here / "embeddings" / file_name(shard)
            if not tar.is_file() or sha256_file(tar) != shard.sha256:
                self.data.child("shards").fetch(shard.name, tar, shard.sha256)
            stored = None
            if self._embeddings.has(target.name):
                self._embeddings.fetch(target.name, target)
                stored = sha256_file(target)
            yield tar.parent, target
            if sha256_file(target) != stored:
                self._embeddings.put(target)

    def keep(self, names: list[str], write: Callable[[Path], None]) -> None:
        """Have `write` write these files into a folder, and keep them."""
        with tempfile.TemporaryDirectory(prefix="pst-embed-") as folder:
            write(Path(folder))
            for name in names:
                self._embeddings.put(Path(folder) / name)

    def announced(self, driver: str) -> contextlib.AbstractContextManager[None]:
        """Nothing to announce: a URL is the same everywhere."""
        return contextlib.nullcontext()

    def for_actor(self) -> RemoteFiles:
        """The same files, for another machine, which keeps no copies."""
        return RemoteFiles(self.data, None)

    def check(self, driver: str) -> None:
        """Raise EnvironmentFault when this machine cannot reach the storage."""
        self._embeddings.check()


Files = FolderFiles | RemoteFiles
