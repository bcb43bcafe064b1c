"""Ranks, and the few things they share: sums, a value from rank zero, an error on any rank.

Every launcher (deepspeed, torchrun, srun, Ray Train) only sets RANK, LOCAL_RANK, WORLD_SIZE and MASTER_*; this
module reads them. Without them there is one rank and no process group.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from pst_dist._version import __version__
from pst_dist.errors import EnvironmentFault, PeerLostError, PstError

SLOWER_THAN_THE_WATCH_SECONDS = 30.0
"""Collectives wait this much longer than `train.timeout_seconds`, so that `peer_watch` names the hung rank first."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank, its rank on this node, and the number of ranks."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank zero; only rank zero writes shared files and logs."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> Ranks:
        """From RANK, LOCAL_RANK and WORLD_SIZE; raises EnvironmentFault when some are missing or invalid."""
        names = ("RANK", "WORLD_SIZE")
        present = [name for name in names if name in os.environ]
        if not present:
            return cls()
        if len(present) != len(names):
            raise EnvironmentFault(f"{present[0]} is set but not all of {', '.join(names)}", "start with torchrun")
        given = {name: os.environ.get(name, "0") for name in (*names, "LOCAL_RANK")}
        wrong = next((name for name, value in given.items() if not re.fullmatch(r"\d{1,9}", value)), None)
        if wrong is not None:
            raise EnvironmentFault(f"{wrong} is {given[wrong]!r}, not a number", "start with torchrun, or unset it")
        rank, world = int(given["RANK"]), int(given["WORLD_SIZE"])
        if rank >= world:
            raise EnvironmentFault(f"RANK is {rank}, but WORLD_SIZE is {world}", "start with torchrun, or unset both")
        return cls(rank, int(given["LOCAL_RANK"]), world)


def check_meeting_place(ranks: Ranks) -> None:
    """Several ranks need a rendezvous address; raises EnvironmentFault when the environment does not give it."""
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if ranks.world_size > 1 and absent and not dist.is_initialized():
        raise EnvironmentFault(
            f"RANK and WORLD_SIZE ask for {ranks.world_size} ranks, but {absent[0]} is not set",
            "start with torchrun, or unset RANK and WORLD_SIZE for a single process",
        )


def device_of(ranks: Ranks) -> torch.device:
    """The accelerator of this rank, or the CPU."""
    wanted = os.environ.get("DS_ACCELERATOR")
    if torch.cuda.is_available() and wanted != "cpu":
        torch.cuda.set_device(ranks.local_rank)
        return torch.device("cuda", ranks.local_rank)
    return torch.device("cpu")


@contextlib.contextmanager
def process_group(ranks: Ranks, *, with_deepspeed: bool, timeout_seconds: float = 600) -> Iterator[None]:
    """The process group of this run, destroyed at the end; none for one rank without DeepSpeed.

    An existing process group is used and left alone. Raises EnvironmentFault when the ranks do not meet within about
    `timeout_seconds`.
    """
    if dist.is_initialized() or (ranks.world_size == 1 and not with_deepspeed):
        yield
        return
    check_meeting_place(ranks)
    # A single rank without a launcher must look to DeepSpeed as if torchrun had started it.
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "LOCAL_RANK": "0"}
    added = {name: value for name, value in alone.items() if ranks.world_size == 1 and name not in os.environ}
    os.environ.update(added)
    backend = "nccl" if device_of(ranks).type == "cuda" else "gloo"
    intact = True
    try:
        with _meeting_errors(ranks):
            timeout = datetime.timedelta(seconds=timeout_seconds + SLOWER_THAN_THE_WATCH_SECONDS)
            dist.init_process_group(backend, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
        yield
        # No rank may close its connections while another still reads from them.
        dist.barrier()
    except PeerLostError:
        intact = False  # destroying a broken group may wait for the lost rank; this process ends anyway
        raise
    finally:
        if intact and dist.is_initialized():
            dist.destroy_process_group()
            _forget_in_deepspeed()
        for name in added:
            del os.environ[name]


def _forget_in_deepspeed() -> None:
    """Make DeepSpeed's next engine create its own groups: it would reuse the first ones for the life of the process."""
    groups = sys.modules.get("deepspeed.utils.groups")
    for name, value in list(vars(groups).items()) if groups is not None else ():
        if isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)


@contextlib.contextmanager
def _meeting_errors(ranks: Ranks) -> Iterator[None]:
    """Turn errors of the rendezvous into EnvironmentFault."""
    try:
        yield
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')} port {os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(error):
            raise EnvironmentFault(f"{place} is in use by another program", "choose another port") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise EnvironmentFault(
            f"the {ranks.world_size} ranks did not meet at {place} ({reason})",
            "check that every rank was started and can reach that address",
        ) from error


def all_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on every rank; works with gloo and NCCL."""
    if not dist.is_initialized():
        return values
    moved = values.to(device_of(Ranks.from_environment())) if dist.get_backend() == "nccl" else values.cpu()
    total = moved.clone()
    dist.all_reduce(total)
    return total.to(values.device)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def from_main(value: Any) -> Any:
    """Rank zero's value, on every rank; the argument of other ranks is ignored."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """All ranks' values in rank order, on every rank; values must be picklable."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def leave(code: int) -> NoReturn:
    """End a rank that a launcher started, without running C++ destructors.

    After a finished ZeRO run, the interpreter's normal exit has been seen to end in SIGABRT ("terminate called without
    an active exception"), which a launcher reports as a failed rank.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def main_first_errors(ranks: Ranks) -> Iterator[None]:
    """Raise an exception of rank zero in this block on every rank, with the same message.

    Otherwise the other ranks would wait in their next collective until its timeout.
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = from_main(failure if ranks.is_main else None)
    if failure is not None:
        raise failure
    if told is not None:
        raise told


@contextlib.contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """Raise an exception of any rank in this block on every rank; the other ranks' message names the rank.

    For work that each rank does by itself, such as opening files that one node may not see. The block must not contain
    a collective.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    told = gathered((os.uname().nodename, failure))
    if failure is not None:
        raise failure
    for rank, (host, other) in enumerate(told):
        if isinstance(other, PstError):
            raise type(other)(f"rank {rank} on {host}: {other.what}", other.remedy, path=other.path, line=other.line)
        if other is not None:
            raise EnvironmentFault(f"rank {rank} on {host} failed ({type(other).__name__}: {other})", "see its message")


def check_same_software() -> None:
    """Raises EnvironmentFault on every rank when they run different versions, whose sums may not be comparable."""
    mine = {"pst_dist": __version__, "torch": str(torch.__version__), "python": ".".join(sys.version.split(".")[:2])}
    told = gathered((os.uname().nodename, mine))
    for name in mine:
        places: dict[str, str] = {}
        for rank, (host, versions) in enumerate(told):
            places.setdefault(versions[name], f"rank {rank} ({host})")
        if len(places) > 1:
            said = ", ".join(f"{version} on {place}" for version, place in places.items())
            raise EnvironmentFault(
                f"ranks differ in {name}: {said}",
                "install the same version on every node; `pst doctor --report` shows what each has",
            )


def sums_over_ranks(output: Tensor) -> Tensor:
    """[...] float64 on the CPU: the sum of a tensor over all ranks."""
    return all_sum(output.detach().double().cpu())
