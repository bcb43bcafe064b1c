"""One artefact: a directory of files with a manifest. Checks whether it is complete and intact, and publishes it.

Every stage does this with its own kind of directory: shards, embeddings, student, evaluation, export and checkpoint.
`manifest` compares the files, `atomic` renames the directory into place.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pst_dist.errors import IntegrityError
from pst_dist.storage.atomic import atomic_directory, publish_directory
from pst_dist.storage.manifest import (
    Manifest,
    all_files,
    describe_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from pst_dist.storage.outputs import refuse_foreign_folder
from pst_dist.storage.stamps import Stamp, remember, remember_published, remembered, stamps_of

log = logging.getLogger(__name__)
_MOST_THREADS = 16


@dataclass
class Draft:
    """An artefact being written."""

    path: Path
    """A temporary directory for its files."""
    extra: dict[str, Any]
    """The manifest's other facts; the block may add to them until it ends."""
    _manifest: Manifest | None = field(default=None, init=False)

    @property
    def manifest(self) -> Manifest:
        """The published manifest; available after the block has ended."""
        assert self._manifest is not None, "not published yet"
        return self._manifest


@dataclass(frozen=True)
class Artefact:
    """A directory for one kind of artefact."""

    directory: Path
    kind: str
    """A kind of `Manifest`."""
    remembers: bool = False
    """Whether files that were compared before and have not changed since are taken as intact (`storage.stamps`)."""

    def manifest(self) -> Manifest | None:
        """Its manifest, without checking the files; None when it is absent or unfinished.

        Raises IntegrityError when the manifest is damaged, EnvironmentFault when it cannot be read.
        """
        return read_manifest(self.directory, self.kind)

    def verified(
        self, fingerprint: str | None = None, *, remedy: str | None = None, on_file: Callable[[], None] | None = None
    ) -> Manifest | None:
        """Its manifest after comparing every file with it; None when absent, unfinished or made from other inputs.

        `fingerprint` identifies the expected inputs; None accepts any. `on_file` is called before each file; without
        it, several files are read in parallel. Raises IntegrityError, with `remedy` when given, for the first damaged
        file, and EnvironmentFault for a file that cannot be read.
        """
        try:
            manifest = self.manifest()
            if manifest is None or fingerprint not in (None, manifest.fingerprint):
                return None
            self._verify(manifest, on_file)
        except IntegrityError as error:
            raise IntegrityError(error.what, remedy or error.remedy, path=error.path) from error
        return manifest

    def finished(self, fingerprint: str | None = None) -> Manifest | None:
        """`verified` for a stage that can recreate it: for damage it logs a warning and returns None.

        Raises EnvironmentFault for a file that cannot be read.
        """
        try:
            return self.verified(fingerprint)
        except IntegrityError as error:
            log.warning("%s in %s is damaged; recreating it: %s", self.kind, self.directory, error)
            return None

    def is_intact(self) -> bool:
        """Whether it is finished and every file matches its manifest."""
        return self.finished() is not None

    @contextlib.contextmanager
    def publish(self, fingerprint: str, extra: dict[str, Any] | None = None) -> Iterator[Draft]:
        """Write it: the block fills `draft.path`; after it, the manifest is written and any older version is replaced.

        When the block raises, nothing changes. Raises InputError when the directory contains anything that pst did not
        write.
        """
        refuse_foreign_folder(self.directory, self.kind)
        with atomic_directory(self.directory) as partial:
            draft = Draft(partial, dict(extra or {}))
            yield draft
            files = describe_files(partial, all_files(partial))
            draft._manifest = Manifest(self.kind, fingerprint, files, draft.extra)
            write_manifest(partial, draft._manifest)
        if self.remembers:
            remember_published(self.directory, draft._manifest.digest, files)

    def publish_prepared(
        self, partial: Path, fingerprint: str, files: dict[str, dict[str, Any]], extra: dict[str, Any]
    ) -> Manifest:
        """Publish a directory that several processes have filled, given the entries of its files; see `publish`."""
        refuse_foreign_folder(self.directory, self.kind)
        manifest = Manifest(self.kind, fingerprint, files, extra)
        write_manifest(partial, manifest)
        publish_directory(partial, self.directory)
        return manifest

    def changed(self, manifest: Manifest) -> tuple[list[str], dict[str, Stamp]]:
        """(the files that are to be compared, the stamps of all files as they are now).

        Those are all files, or with `remembers` those that are not as they were when they were compared last.
        """
        names = sorted(manifest.files)
        if not self.remembers:
            return names, {}
        stamps, known = stamps_of(self.directory, names), remembered(self.directory, manifest.digest)
        return [name for name in names if name not in stamps or stamps[name] != known.get(name)], stamps

    def were_compared(self, manifest: Manifest, stamps: dict[str, Stamp]) -> None:
        """Note that files with these stamps match the manifest."""
        if self.remembers:
            remember(self.directory, manifest.digest, stamps)

    def _verify(self, manifest: Manifest, on_file: Callable[[], None] | None) -> None:
        names, stamps = self.changed(manifest)
        if on_file is not None:
            verify_files(self.directory, manifest, names, on_file=on_file)
        else:
            verify_at_once(self.directory, manifest, names)
        if names:
            self.were_compared(manifest, stamps)


def verify_at_once(
    directory: Path,
    manifest: Manifest,
    names: Iterable[str] | None = None,
    *,
    threads: int | None = None,
    on_file: Callable[[], None] = lambda: None,
) -> None:
    """`verify_files` in threads, since hashing releases the GIL; raises for the first bad file in order of names.

    `threads` is one for each core by default, at most 16. `on_file` is called from them.
    """
    with ThreadPoolExecutor(threads or min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        ordered = sorted(manifest.files if names is None else names)
        futures = [pool.submit(verify_files, directory, manifest, [name], on_file=on_file) for name in ordered]
        try:
            for future in futures:
                future.result()
        finally:
            for future in futures:
                future.cancel()
