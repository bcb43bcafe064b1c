"""Training as a Slurm job: the command line's options, and the batch script that they produce.

The only script is `cluster/train.sbatch`; this module fills in its `#SBATCH` lines and arguments. Inside an array, the
script calls `python -m pst_dist.slurm` to find out which arm and seed its task trains. This module does not contact
Slurm: `clusters.slurm.submit` and `clusters.slurm.follow` do.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pst_dist.arms import ARMS
from pst_dist.clusters.slurm.commands import comment_of
from pst_dist.config.loading import load_config
from pst_dist.config.overrides import parse_override
from pst_dist.config.run_dir import data_settings, run_dir
from pst_dist.config.schema import Config
from pst_dist.errors import ConfigError, PstError
from pst_dist.plain import plain

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
_OWN = ("nodes", "gpus", "ranks", "warn", "parallel", "arms", "seeds")
_MARK = "#PST arguments"


@dataclass(frozen=True, kw_only=True)
class SlurmRequest:
    """What a job asks for; every option comes from the command line."""

    nodes: int = 1
    gpus: str = ""
    """GPUs per node in Slurm's notation: `8` or `a100:8`; none when empty."""
    ranks: int | None = None
    """Ranks per node on nodes without GPUs; one when not given."""
    warn_seconds: int = 120
    """How long before the time limit Slurm sends the signal to save."""
    parallel: int | None = None
    """Most tasks of an array that run at the same time; no limit when not given."""
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    options: dict[str, str] = field(default_factory=dict)
    """sbatch option, without dashes -> its value."""

    @property
    def gpu_count(self) -> int:
        """GPUs on each node."""
        return int(self.gpus.rpartition(":")[2] or 0)

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
    # Not parsed as YAML, where 04:00:00 is a base-60 number.
    if "time" in options and not _TIME.fullmatch(options["time"]):
        raise ConfigError(f"time={options['time']} is not a time limit", "write hours:minutes:seconds or days-hours")
    gpus = asked.get("gpus", "")
    if not re.fullmatch(r"([A-Za-z][\w.-]*:)?\d+|", gpus):
        raise ConfigError(f"gpus={gpus} is not a number of GPUs per node", "write gpus=8 or gpus=a100:8")
    request = SlurmRequest(
        nodes=_number(asked, "nodes") or 1,
        gpus="" if gpus.rpartition(":")[2] in ("", "0") else gpus,
        ranks=_number(asked, "ranks"),
        warn_seconds=_number(asked, "warn") or 120,
        parallel=_number(asked, "parallel"),
        arms=_arms(asked),
        seeds=_seeds(asked),
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


def template(name: str = "train.sbatch") -> Path:
    """A script of `cluster/`, which is next to the package in a checkout and inside it in a wheel."""
    package = Path(__file__).parents[2]
    for folder in (package / "cluster", package.parent / "cluster"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"the script {name} is missing from this installation", "reinstall pst-dist")


def render(request: SlurmRequest, config: Config, snapshot: Path) -> str:
    """The script of one job: the template with this request's `#SBATCH` lines and arguments.

    `snapshot` is the resolved config that the job reads, so editing the original while the job waits changes nothing.
    Every value is quoted, for Slurm or for the shell. Raises ConfigError for a value that cannot be quoted: control
    characters anywhere, and a backslash in output_dir, because of which Slurm would not expand the name of the log.
    """
    base = Path(config.output_dir).absolute()
    for what, value in (("output_dir", base), ("the working directory", Path.cwd()), ("python's path", sys.executable)):
        plain(str(value), what)
    if "\\" in str(snapshot):
        raise ConfigError(f"output_dir={config.output_dir} contains a backslash", "choose a path without one for Slurm")
    number = "%A_%a" if request.tasks else "%j"
    options = {
        "job-name": f"pst-{base.name}",
        "nodes": str(request.nodes),
        "output": f"{_no_pattern(snapshot.parent)}/{number}.log",
        "chdir": str(Path.cwd()),
        "comment": comment_of(base),
        "signal": f"B:USR1@{request.warn_seconds}",
    }
    if request.gpus:
        options["gpus-per-node"] = request.gpus
    if request.tasks:
        limit = f"%{request.parallel}" if request.parallel else ""
        options["array"] = f"0-{request.tasks - 1}{limit}"
    options |= request.options
    words = [str(snapshot)]
    if request.arms:
        words.append(f"arms=[{','.join(request.arms)}]")
    if request.seeds:
        words.append(f"seeds=[{','.join(map(str, request.seeds))}]")
    filled = [f"export PST_PYTHON={shlex.quote(sys.executable)}"]
    filled += [f"export PST_RANKS_PER_NODE={request.ranks}"] if request.ranks else []
    # Without GPUs, DeepSpeed would look for one on every rank and print a warning.
    filled += [] if request.gpus else ["export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}"]
    filled.append(f"set -- {shlex.join(words)}")
    return _filled(template().read_text("utf-8"), options, filled)


def _filled(text: str, options: dict[str, str], filled: list[str]) -> str:
    """Replace the `#SBATCH` lines in `options`, add the other options below, and insert `filled` at its mark."""
    lines, last = [], 0
    for line in text.splitlines():
        asked = re.match(r"#SBATCH --([\w-]+)", line)
        if asked and asked[1] in options:
            continue
        lines.append(line)
        if asked:
            last = len(lines)
    lines[last:last] = [f"#SBATCH --{name}={_quoted(value)}" for name, value in options.items()]
    place = lines.index(_MARK)
    lines[place : place + 1] = filled
    return "\n".join(lines) + "\n"


def _no_pattern(path: Path) -> str:
    """A path with % escaped for Slurm's log name pattern, in which `%j` and the like are placeholders."""
    return str(path).replace("%", "%%")


def _quoted(value: str) -> str:
    """Any value quoted as one word of an `#SBATCH` line; raises ConfigError for control characters.

    sbatch parses these lines like a shell that knows only quotes and backslashes (src/sbatch/opt.c); plain values stay
    unquoted, for readability.
    """
    plain(value, "a value for sbatch")
    if re.fullmatch(r"[\w@%+=:,./\[\]-]+", value, re.ASCII):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


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
