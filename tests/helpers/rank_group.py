"""Ranks without a launcher, to be killed, stopped and cut off: forked from a process that has imported everything.

A start takes a second instead of ten, so that many losses can be tested. A rank runs `pst_dist.train`, as a launcher
starts it, or `laps`, which looks like a training to `distributed.peer_watch` but needs no student. Launchers run this
file to start the same.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from hosts import enter_host
from ports import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
# What a training imports, most of it behind lazy doors: each rank would else spend seconds on it.
_CONTEXT.set_forkserver_preload(
    [
        "deepspeed.module_inject.auto_ep_layer",
        "deepspeed.ops.op_builder.all_ops",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "functorch.compile",
        "pst_dist.cli.main",
        "pst_dist.diagnostics.cost",
        "pst_dist.training.trainer",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        "transformers.convert_slow_tokenizer",
        "transformers.generation.utils",
        "transformers.models.gpt2.modeling_gpt2",
        __name__,
    ]
)
os.environ.setdefault("PYTHONWARNINGS", "ignore")
_PR_SET_PDEATHSIG = 1
DEAD_SECONDS = 10
"""By when every other rank must have ended after one died."""


@dataclass(frozen=True)
class Stuck:
    """A rank whose training thread comes to a section and never leaves it; its watcher lives on."""

    rank: int
    section: str
    step: int | None


@dataclass
class RankGroup:
    """The ranks of one run; what each says goes to rank-N.log in `folder`."""

    folder: Path
    words: list[str]
    """Of `python -m pst_dist.train`; or `laps TIMEOUT`."""
    world_size: int = 2
    stuck: Stuck | None = None
    hosts: tuple[str, ...] = ()
    """The host of each rank (see `hosts`); this machine when not given."""
    master: str = "127.0.0.1"
    refuses: dict[int, int] = field(default_factory=dict)
    """Rank -> most tokens of a pass that its student takes (see `refusing`)."""
    processes: list[BaseProcess] = field(default_factory=list)
    lost_at: float | None = None
    """When a rank was killed or stopped; set by the test that did."""
    ended: dict[int, float] = field(default_factory=dict)
    """Rank -> when it was seen to have ended, in seconds of the monotonic clock."""

    def start(self) -> RankGroup:
        """Start the ranks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        for rank in range(self.world_size):
            host = self.hosts[rank] if self.hosts else ""
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world_size}
            place |= {"MASTER_ADDR": self.master, "MASTER_PORT": port}
            place_words = {k: str(v) for k, v in place.items()}
            arguments = (self.folder, self.words, place_words, self.stuck, host, self.refuses.get(rank))
            self.processes.append(_CONTEXT.Process(target=_run_rank, args=arguments))
            self.processes[-1].start()
        return self

    def signal(self, rank: int, number: int) -> float:
        """Send a signal to one rank; returns when."""
        os.kill(self.processes[rank].pid or 0, number)
        return time.monotonic()

    def look(self) -> list[int]:
        """The ranks that have ended by now."""
        for rank, process in enumerate(self.processes):
            if rank not in self.ended and not process.is_alive():
                self.ended[rank] = time.monotonic()
        return sorted(self.ended)

    def codes(self) -> list[int | None]:
        """Exit codes; None for a rank that still runs."""
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> str:
        """What a rank wrote so far."""
        path = self.folder / f"rank-{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def errors(self, rank: int) -> list[str]:
        """The lines about errors, and those of tracebacks, which there must not be."""
        return [line for line in self.said(rank).splitlines() if "error" in line.lower() or "Traceback" in line]

    def is_stuck(self) -> bool:
        """Whether the stuck rank has arrived where it stays, and has told so."""
        return (self.folder / "stuck").exists()

    def stop(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _run_rank(
    folder: Path, words: list[str], place: dict[str, str], stuck: Stuck | None, host: str, refuses: int | None
) -> None:
    """In the child: become a rank, and end as `python -m pst_dist.train` does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with open(folder / f"rank-{place['RANK']}.log", "ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if host:
        enter_host(host)
    os.environ.update(place)
    multiprocessing.set_start_method("fork", force=True)  # as in any process; loader workers are forked
    if stuck is not None and stuck.rank == int(place["RANK"]):
        _get_stuck(stuck, folder / "stuck")
    from pst_dist.distributed.ranks import leave

    if words[0] == "laps":
        leave(laps(float(words[1]), folder / "stacks", *words[2:]))
    from pst_dist.train import main

    if refuses is not None:
        from refusing import Refusing, refusing_students

        with refusing_students(Refusing(refuses)):
            leave(main(words))
    leave(main(words))


def _get_stuck(stuck: Stuck, told: Path) -> None:
    """Make `at` never return from that section, and note when the watcher has passed on that we are there."""
    from pst_dist.distributed import peer_watch, progress
    from pst_dist.training import trainer  # it imports all modules that say where they are

    assert trainer
    at, tell = progress.at, peer_watch._Watcher._tell

    def at_and_stay(section: str, step: int | None = None) -> None:
        at(section, step)
        while (section, step) == (stuck.section, stuck.step):
            time.sleep(1)

    def tell_and_note(watcher: peer_watch._Watcher, message: dict) -> None:
        tell(watcher, message)
        if message.get("place", [])[:2] == [stuck.section, stuck.step]:
            told.touch()

    for module in list(sys.modules.values()):
        if module.__name__.startswith("pst_dist.") and getattr(module, "at", None) is at:
            module.at = at_and_stay  # type: ignore[attr-defined]
    peer_watch._Watcher._tell = tell_and_note  # type: ignore[method-assign]


def laps(timeout_seconds: float, stacks: Path | None = None, native: str = "") -> int:
    """Two sections and two collectives a step, without end; returns the exit code of what ended it.

    With `native` the second rank spends twice the timeout in one call without a sign in step 3, where it `computes` or
    `sleeps`, and the laps end after step 5.
    """
    import torch

    from pst_dist.distributed import peer_watch, progress
    from pst_dist.distributed.preemption import stop_requests
    from pst_dist.distributed.ranks import Ranks, all_sum, process_group
    from pst_dist.errors import PstError

    ranks = Ranks.from_environment()
    try:
        with (
            process_group(ranks, with_deepspeed=False, timeout_seconds=timeout_seconds),
            stop_requests(),
            peer_watch.watched(ranks, timeout_seconds, stacks),
        ):
            for step in range(1, 6) if native else itertools.count(1):
                if native and step == 3 and ranks.rank == 1:
                    with progress.working():
                        _native_call(native, 2 * timeout_seconds)
                for section in ("forward", "backward"):
                    progress.at(section, step)
                    all_sum(torch.ones(4))
                    time.sleep(0.01)
    except PstError as error:
        print(f"pst: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _native_call(kind: str, seconds: float) -> None:
    """Sleep, or compute in a thread of a pool while this thread waits, as weights are read."""
    if kind == "sleeps":
        time.sleep(seconds)
        return
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(1) as pool:
        while time.monotonic() < end:
            pool.submit(hashlib.pbkdf2_hmac, "sha256", b"", b"", 100_000).result()


def main() -> None:
    """`rank_group.py laps TIMEOUT`, or `rank_group.py FOLDER RANK SECTION STEP words…` of a training.

    That rank gets stuck there when it is started for the first time.
    """
    from pst_dist.distributed.ranks import leave

    if sys.argv[1] == "laps":
        leave(laps(float(sys.argv[2])))
    from pst_dist.train import main as train

    told = Path(sys.argv[1]) / "stuck"
    if os.environ["RANK"] == sys.argv[2] and not told.exists():
        (told.parent / "pid").write_text(str(os.getpid()))
        _get_stuck(Stuck(int(sys.argv[2]), sys.argv[3], int(sys.argv[4])), told)
    leave(train(sys.argv[5:]))


if __name__ == "__main__":
    main()
