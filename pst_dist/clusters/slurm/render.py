"""The batch scripts of a run: one job for each group of stages, with GPUs only where a stage uses them.

The scripts are those of `cluster/`; this module fills in their `#SBATCH` lines and arguments. It does not contact
Slurm: `clusters.slurm.submit` and `clusters.slurm.follow` do.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from pst_dist.clusters.plain import plain
from pst_dist.clusters.slurm.commands import comment_of
from pst_dist.clusters.slurm.script import SlurmRequest
from pst_dist.config.schema import Config
from pst_dist.embedding.targets import needs_embeddings
from pst_dist.errors import ConfigError

_MARK = "#PST arguments"
_FINISH = ("evaluate", "export", "report")


@dataclass(frozen=True)
class Stage:
    """One job of a run."""

    name: str
    """Name of its script and the end of its job's name."""
    template: str
    """File in `cluster/`."""
    verbs: tuple[str, ...]
    """The verbs of `pst` that it runs, in order."""
    nodes: int = 1
    gpus: str = ""
    """GPUs per node, in Slurm's notation."""
    is_array: bool = False
    """Whether it has one task per arm and seed."""


def stages(request: SlurmRequest, config: Config) -> list[Stage]:
    """The jobs of a submission, each of which starts when the one before it has succeeded."""
    is_array = bool(request.tasks)
    on_ray = config.train.backend == "ray"
    train = Stage(
        "train", "ray.sbatch" if on_ray else "train.sbatch", ("train",), request.nodes, request.gpus, is_array
    )
    if on_ray and is_array:
        raise ConfigError(
            "train.backend=ray does not support an array of arms and seeds", "submit each, or leave out on=ray"
        )
    if request.verb == "train":
        return [train]
    finish = Stage("finish", "stage.sbatch", _FINISH, 1, request.one_gpu, is_array)
    embeds = needs_embeddings(config.model_copy(update={"arms": list(request.arms) or config.arms}))
    if embeds and config.embed.backend == "ray":
        embed = Stage("embed", "ray.sbatch", ("embed",), request.nodes, request.gpus)
    elif embeds and request.gpus:
        embed = Stage("embed", "stage.sbatch", ("embed",), 1, request.one_gpu)
    else:  # one job of one process does both
        return [Stage("data", "stage.sbatch", ("shard", *(["embed"] if embeds else []))), train, finish]
    return [Stage("shard", "stage.sbatch", ("shard",)), embed, train, finish]


def template(name: str = "train.sbatch") -> Path:
    """A script of `cluster/`, which is next to the package in a checkout and inside it in a wheel."""
    package = Path(__file__).parents[2]
    for folder in (package / "cluster", package.parent / "cluster"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"the script {name} is missing from this installation", "reinstall pst-dist")


def render(request: SlurmRequest, config: Config, snapshot: Path, stage: Stage | None = None) -> str:
    """The script of one job, of the training when no stage is given: the template with its lines and arguments.

    `snapshot` is the resolved config that the job reads, so editing the original while the job waits changes nothing.
    Every value is quoted, for Slurm or for the shell. Raises ConfigError for a value that cannot be quoted: control
    characters anywhere, and a backslash in output_dir, because of which Slurm would not expand the name of the log.
    """
    stage = stage or stages(request, config)[-1 if request.verb == "train" else -2]
    base = Path(config.output_dir).absolute()
    for what, value in (("output_dir", base), ("the working directory", Path.cwd()), ("python's path", sys.executable)):
        plain(str(value), what)
    if "\\" in str(snapshot):
        raise ConfigError(f"output_dir={config.output_dir} contains a backslash", "choose a path without one for Slurm")
    number = "%A_%a" if stage.is_array else "%j"
    alone = request.verb == "train"
    options = {
        "job-name": f"pst-{base.name}" + ("" if alone else f"-{stage.name}"),
        "nodes": str(stage.nodes),
        "output": f"{_no_pattern(snapshot.parent)}/{number}.log",
        "chdir": str(Path.cwd()),
        "comment": comment_of(base),
        "signal": f"B:USR1@{request.warn_seconds}",
    }
    if stage.gpus:
        options["gpus-per-node"] = stage.gpus
    if stage.is_array:
        limit = f"%{request.parallel}" if request.parallel else ""
        options["array"] = f"0-{request.tasks - 1}{limit}"
    options |= request.options
    if not alone and "job-name" in request.options:
        options["job-name"] += f"-{stage.name}"
    if request.cpu_partition and request.gpus and not stage.gpus:
        options["partition"] = request.cpu_partition
    words = [str(snapshot)] if stage.template == "train.sbatch" else [" ".join(stage.verbs), str(snapshot)]
    if request.arms and stage.is_array:
        words.append(f"arms=[{','.join(request.arms)}]")
    if request.seeds and stage.is_array:
        words.append(f"seeds=[{','.join(map(str, request.seeds))}]")
    filled = [f"export PST_PYTHON={shlex.quote(sys.executable)}"]
    filled += [f"export PST_RANKS_PER_NODE={request.ranks}"] if request.ranks else []
    # Without GPUs, DeepSpeed would look for one on every rank and print a warning.
    filled += [] if stage.gpus else ["export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}"]
    filled.append(f"set -- {shlex.join(words)}")
    return _filled(template(stage.template).read_text("utf-8"), options, filled)


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
