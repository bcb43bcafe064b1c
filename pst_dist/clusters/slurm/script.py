"""The command line of `pst submit slurm`: separates job options from config keys; arms and seeds as array tasks.

Inside an array, the scripts call `python -m pst_dist.slurm` (`main` here) to find out which arm and seed a task has.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from pst_dist.arms import ARMS
from pst_dist.clusters.plain import plain
from pst_dist.config.explain import refuse_misspelt
from pst_dist.config.loading import load_config
from pst_dist.config.overrides import parse_override
from pst_dist.config.run_dir import data_settings, run_dir
from pst_dist.errors import ConfigError, PstError

_TIME = re.compile(r"(\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2}|UNLIMITED)", re.IGNORECASE)
_SBATCH_OF = {
    "time": "time",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "cpus": "cpus-per-task",
    "mem": "mem",
    "name": "job-name",
}
"""Our option -> sbatch's option. Any other option is `sbatch.OPTION=value`."""
_OWN = ("verb", "nodes", "gpus", "ranks", "warn", "parallel", "arms", "seeds", "cpu_partition")


@dataclass(frozen=True, kw_only=True)
class SlurmRequest:
    """What a job asks for; every option comes from the command line."""

    verb: str = "run"
    """`run` for every stage, each as a job of its own; `train` for the training alone."""
    nodes: int = 1
    """Nodes of the training."""
    gpus: str = ""
    """GPUs per node of the training in Slurm's notation: `8` or `a100:8`; none when empty."""
    ranks: int | None = None
    """Ranks per node on nodes without GPUs; one when not given."""
    warn_seconds: int = 120
    """How long before the time limit Slurm sends the signal to save."""
    parallel: int | None = None
    """Most tasks of an array that run at the same time; no limit when not given."""
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    cpu_partition: str | None = None
    """Partition of the jobs without GPUs, where it differs from that of the others."""
    options: dict[str, str] = field(default_factory=dict)
    """sbatch option, without dashes -> its value."""

    @property
    def gpu_count(self) -> int:
        """GPUs on each node."""
        return int(self.gpus.rpartition(":")[2] or 0)

    @property
    def one_gpu(self) -> str:
        """One GPU of the kind that the training uses; empty without GPUs."""
        return re.sub(r"\d+$", "1", self.gpus) if self.gpus else ""

    @property
    def world_size(self) -> int:
        """Ranks of the training over all nodes."""
        return self.nodes * (self.gpu_count or self.ranks or 1)

    @property
    def tasks(self) -> int:
        """Tasks of the array; 0 when the job is not one."""
        return len(cells(self.arms, self.seeds)) if self.arms or self.seeds else 0


def read_words(words: Sequence[str]) -> tuple[SlurmRequest, list[str]]:
    """Split `nodes=2 gpus=8 time=04:00:00 … train.bf16=true` into the request and the config's overrides.

    Raises ConfigError for a value that Slurm would not accept.
    """
    asked: dict[str, str] = {}
    rest, options = [], {}
    for word in words:
        key, _, value = word.partition("=")
        if key in _OWN or key in _SBATCH_OF or key.startswith("sbatch."):
            plain(value, key if re.fullmatch(r"[\w.-]+", key) else "an option of sbatch")
        if key in _OWN:
            asked[key] = value
        elif key in _SBATCH_OF:
            options[_SBATCH_OF[key]] = value
        elif key.startswith("sbatch."):
            option = key.removeprefix("sbatch.")
            if not re.fullmatch(r"[a-z][a-z0-9-]*", option):
                raise ConfigError(f"{key!r} is not an option of sbatch", "write for example sbatch.reservation=NAME")
            options[option] = value
        else:
            rest.append(word)
    refuse_misspelt(rest, (*_OWN, *_SBATCH_OF))
    # Not parsed as YAML, where 04:00:00 is a base-60 number.
    if "time" in options and not _TIME.fullmatch(options["time"]):
        raise ConfigError(f"time={options['time']} is not a time limit", "write hours:minutes:seconds or days-hours")
    gpus = asked.get("gpus", "")
    if not re.fullmatch(r"([A-Za-z][\w.-]*:)?\d+|", gpus):
        raise ConfigError(f"gpus={gpus} is not a number of GPUs per node", "write gpus=8 or gpus=a100:8")
    verb = asked.get("verb", "run")
    if verb not in ("run", "train"):
        raise ConfigError(f"verb={verb} is not a verb for Slurm jobs", "write verb=run or verb=train")
    request = SlurmRequest(
        verb=verb,
        nodes=_number(asked, "nodes") or 1,
        gpus="" if gpus.rpartition(":")[2] in ("", "0") else gpus,
        ranks=_number(asked, "ranks"),
        warn_seconds=_number(asked, "warn") or 120,
        parallel=_number(asked, "parallel"),
        arms=_arms(asked),
        seeds=_seeds(asked),
        cpu_partition=asked.get("cpu_partition"),
        options=options,
    )
    if request.ranks and request.gpus:
        raise ConfigError("ranks= is for nodes without GPUs", "leave it out: there is one rank per GPU")
    return request, rest


def _number(asked: dict[str, str], key: str) -> int | None:
    text = asked.get(key)
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", text) is None or int(text) < 1:
        raise ConfigError(f"{key}={text[:80]} is not a positive whole number", f"write for example {key}=2")
    return int(text)


def _listed(asked: dict[str, str], key: str) -> list[object]:
    if key not in asked:
        return []
    _, value = parse_override(f"{key}={asked[key]}")
    if not isinstance(value, list) or not value or len({str(entry) for entry in value}) != len(value):
        raise ConfigError(f"{key}={asked[key]} is not a list of distinct values", f"write {key}=[one,two]")
    return value


def _arms(asked: dict[str, str]) -> tuple[str, ...]:
    arms = tuple(str(arm) for arm in _listed(asked, "arms"))
    for arm in arms:
        if arm not in ARMS:
            raise ConfigError(f"arms: there is no arm {arm!r}", f"choose from {', '.join(ARMS)}")
    return arms


def _seeds(asked: dict[str, str]) -> tuple[int, ...]:
    seeds = []
    for seed in _listed(asked, "seeds"):
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ConfigError(f"seeds: {seed!r} is not a whole number", "write seeds=[0,1,2]")
        seeds.append(seed)
    return tuple(seeds)


def cells(arms: Sequence[str], seeds: Sequence[int]) -> list[tuple[str | None, int | None]]:
    """The (arm, seed) of each task of an array: all arms of the first seed, then those of the next.

    None means "as in the config", when only arms or only seeds were given.
    """
    columns: Sequence[str | None] = arms or [None]
    rows: Sequence[int | None] = seeds or [None]
    return [(arm, seed) for seed, arm in itertools.product(rows, columns)]


def array_words(words: Sequence[str], index: int) -> list[str]:
    """The arguments of one array task: `config [words] arms=[…] seeds=[…]` reduced to its own arm, seed and folder.

    The folder is `output_dir/seed-N/ARM`, without the parts that were not given; shards and embeddings are shared.
    Raises ConfigError when the matrix has no such task.
    """
    request, rest = read_words(words)
    matrix = cells(request.arms, request.seeds)
    if not request.tasks or not 0 <= index < len(matrix):
        raise ConfigError(
            f"task {index} of the array has no arm or seed: arms= and seeds= name {request.tasks} of them",
            f"submit with --array=0-{max(request.tasks, 1) - 1} and arms=[…] seeds=[…]",
        )
    arm, seed = matrix[index]
    config = load_config(rest[0], rest[1:])
    folder = run_dir(config).path
    own = []
    if seed is not None:
        folder = folder / f"seed-{seed}"
        own.append(f"seed={seed}")
    if arm is not None:
        folder = folder / arm
        own += ["arms=[]", f"arm={arm}"]
    return [*rest, *own, f"output_dir={folder}", *(f"{key}={value}" for key, value in data_settings(config).items())]


def main() -> int:
    """Print the arguments of this process's array task, each followed by a NUL."""
    try:
        words = array_words(sys.argv[1:], int(os.environ["SLURM_ARRAY_TASK_ID"]))
    except PstError as error:
        print(f"pst: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    sys.stdout.write("".join(f"{word}\0" for word in words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
