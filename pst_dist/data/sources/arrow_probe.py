"""Read Arrow and Parquet files in a child process before this one does.

Arrow's C++ readers trust lengths and offsets in the file, so a damaged file can crash the process with a signal that no
exception handler catches. The child reads and validates everything; if it crashes, the parent names the file. This file
is also the child's script; it imports nothing from the package, so that it starts fast.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


class Unreadable(Exception):
    """A file that the child could not read; the message gives the reason."""


def probe(paths: list[Path], most_bytes: int) -> None:
    """Read all files in a child process; raises Unreadable with the name of the first damaged one.

    `most_bytes` limits the size of one file in memory.
    """
    # PYTHONSAFEPATH: the modules next to this file must not shadow others in the child.
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(word for word in sys.path if word),
    }
    command = [sys.executable, __file__, str(most_bytes), *map(str, paths)]
    child = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    if child.returncode == 0:
        return
    reading = child.stdout.strip().rpartition("\n")[2] or str(paths[0])
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise Unreadable(f"{Path(reading).name} is damaged: it crashes the reader with {name}")
    reason = child.stderr.strip().rpartition("\n")[2][:160] or f"exit status {child.returncode}"
    raise Unreadable(f"{Path(reading).name}: {reason}")


def _read_all(path: str, most_bytes: int) -> None:
    import pyarrow

    if path.endswith(".arrow"):
        with pyarrow.memory_map(path) as source:
            try:
                batches = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                source.seek(0)
                batches = pyarrow.ipc.open_file(source)
                batches = (batches.get_batch(place) for place in range(batches.num_record_batches))
            for batch in batches:
                batch.validate(full=True)
        return
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as table:
        promised = sum(
            table.metadata.row_group(group).column(column).total_uncompressed_size
            for group in range(table.metadata.num_row_groups)
            for column in range(table.metadata.num_columns)
        )
        total = 0
        if not 0 <= promised <= most_bytes:
            raise ValueError(f"expands to {promised} bytes, more than {most_bytes >> 20} MiB")
        for batch in table.iter_batches(batch_size=64):
            batch.validate(full=True)
            total += batch.nbytes
            if total > most_bytes:
                raise ValueError(f"expands to more than {most_bytes >> 20} MiB")


def _main() -> None:
    most_bytes, *paths = sys.argv[1:]
    # Crashes are expected here, so their core files are useless.
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass
    for path in paths:
        sys.stdout.write(path + "\n")
        sys.stdout.flush()  # before reading the file: a crash loses buffered output
        try:
            _read_all(path, int(most_bytes))
        except Exception as error:  # Arrow's exceptions, OSError, and the ones raised above
            sys.exit(next(iter(str(error).splitlines()), type(error).__name__))


if __name__ == "__main__":
    _main()
