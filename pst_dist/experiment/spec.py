"""The experiment file, and the runs that it defines.

A file names tasks, variants (an arm, or an arm with some keys changed), seeds and, for a sweep, values of other keys.
Every combination is one run: an ordinary config with its own directory; runs with the same rows share their data.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pst_dist.arms import ARMS, BASELINE, COST_BASELINE
from pst_dist.config.explain import explain, refuse_misspelt
from pst_dist.config.keys import flat_keys, known_keys
from pst_dist.config.loading import lay_over, load_tree
from pst_dist.config.locate import check_name, ready_made_configs
from pst_dist.config.overrides import parse_override, set_key
from pst_dist.config.schema import Config, RayConfig
from pst_dist.config.section import Folder, Positive, Section, Weight
from pst_dist.config.yaml_text import read_yaml
from pst_dist.errors import ConfigError, InputError, PstError
from pst_dist.storage.manifest import digest_of

_FIVE = tuple(name for name, arm in ARMS.items() if not arm.chooses_order)
_BEGIN = "config"
"""The key of a task that names its base config."""
_ONLY = ("variants", "seeds")
"""Keys of a task that restrict it to some of the experiment's variants and seeds."""
_OWN = ("output_dir", "data_dir", "data_cache", "arms", "seed")
"""Keys that the experiment sets for each run."""


class RayJobs(Section):
    """Resources of the runs with backend=ray; each run is one Ray task."""

    address: str | None = None
    """Cluster to join, as in embed.ray.address; defaults to RAY_ADDRESS, else a local cluster."""
    num_cpus_per_run: Weight = 1
    """CPU cores per run; also its number of torch threads."""
    num_gpus_per_run: Weight | None = None
    """GPUs per run; with a fraction several runs share one. Default: 1 on a cluster that has GPUs, else 0."""

    @property
    def cluster(self) -> RayConfig:
        """The same as a RayConfig, for `ray_cluster`."""
        return RayConfig(address=self.address)


class Experiment(Section):
    """Tasks x variants x values x seeds, on identical rows."""

    name: str
    """Name of the output directory and the page; letters, digits, `-` and `_`."""
    question: str = ""
    """The question that the experiment answers, in a few sentences; the page begins with it."""
    output_dir: Folder | None = None
    """Directory of all runs and results; defaults to runs/experiments/NAME."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Keys of every run: `train.max_steps: 300`, or sections as in a config. A task's own keys win over them."""
    overlays: list[str] = Field(default=[])
    """Overlays such as `+paper_t5`, applied to the config of every task; `settings` win over them."""
    recipe: list[str] = Field(default=[])
    """Overlays that win over `settings` and a task's own keys, such as `+paper_t5` on the command line."""
    tasks: dict[str, dict[str, Any]]
    """Label of a task -> keys of its runs; `config:` names its base config (file or ready-made), and `variants:` and
    `seeds:` restrict the task to some of the experiment's."""
    variants: dict[str, dict[str, Any]] = Field(default_factory=lambda: {name: {"arm": name} for name in _FIVE})
    """Label of a variant -> its keys, applied over the task's; defaults to the five arms of the method."""
    vary: dict[str, list[Any]] = Field(default_factory=dict)
    """Key -> values: every task and variant is run with each value, or with each combination of several keys."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys that win over all others, like those of the command line."""
    seeds: list[int] = Field(default=[0, 1, 2])
    """Every task, variant and value is run once per seed."""
    baselines: list[str] = Field(default=[BASELINE, COST_BASELINE])
    """Variants that all others are tested against, on the same rows."""
    pairs: list[tuple[str, str]] = Field(default=[])
    """Further pairs of variants to test against each other: `[pst, post_thinking]`."""
    keep: Literal["results", "student", "all"] = "student"
    """What is kept of a finished run: only its results, also the student, or also the checkpoints."""
    jobs: Positive | None = None
    """Runs at a time on this machine; defaults to its number of GPUs, or of CPU cores without a GPU."""
    backend: Literal["local", "ray"] = "local"
    """Where runs go: processes on this machine, or tasks of a Ray cluster."""
    ray: RayJobs = RayJobs()
    """Settings of the Ray backend."""

    @model_validator(mode="after")
    def _can_be_run(self) -> Experiment:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"name: {self.name!r} may only contain letters, digits, - and _")
        for key, values in (("tasks", self.tasks), ("variants", self.variants), ("seeds", self.seeds)):
            if not values:
                raise ValueError(f"{key} is empty")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds contains a duplicate")
        empty = [key for key, values in self.vary.items() if not values]
        if empty:
            raise ValueError(f"vary.{empty[0]} has no values")
        unknown = [name for pair in self.pairs for name in pair if name not in self.variants]
        if unknown:
            raise ValueError(f"pairs: there is no variant {unknown[0]!r}")
        for task, keys in self.tasks.items():
            for key, kind, words in (("variants", str, "labels of variants"), ("seeds", int, "whole numbers")):
                wanted = keys.get(key)
                if wanted is not None and not _is_list_of(wanted, kind):
                    raise ValueError(f"tasks.{task}.{key} is not a list of {words}")
            # Seeds are not compared with the experiment's: `seeds=[0]` may leave out those that a task names.
            unknown = [name for name in keys.get("variants") or () if name not in self.variants]
            if unknown:
                raise ValueError(f"tasks.{task}.variants: there is no variant {unknown[0]!r}")
        return self

    def includes(self, task: str, variant: str, seed: int) -> bool:
        """Whether a task is run with this variant and seed."""
        keys = self.tasks[task]
        variants, seeds = keys.get("variants"), keys.get("seeds")
        return (variants is None or variant in variants) and (seeds is None or seed in seeds)

    @property
    def path(self) -> Path:
        """The experiment's directory."""
        return Path(self.output_dir or f"runs/experiments/{self.name}")

    @property
    def points(self) -> list[Point]:
        """Every combination of the varied values; a single empty one when nothing varies."""
        return [tuple(zip(self.vary, values, strict=True)) for values in itertools.product(*self.vary.values())]


def _is_list_of(value: Any, kind: type) -> bool:
    """Whether a value is a list, not empty, of exactly this type: True is no whole number."""
    return isinstance(value, list) and bool(value) and all(type(one) is kind for one in value)


Point = tuple[tuple[str, Any], ...]
"""(key, value) of each varied key."""


@dataclass(frozen=True)
class Run:
    """One training and its evaluation."""

    task: str
    variant: str
    point: Point
    seed: int
    config: Config
    alike: tuple[str, ...] = ()
    """Directories of earlier runs with the same training that are only scored differently."""

    @property
    def name(self) -> str:
        """A readable name, on one line."""
        return " / ".join([self.task, self.variant, *point_words(self.point), f"seed {self.seed}"])

    @property
    def group(self) -> tuple[str, str, Point]:
        """The key shared with the same run of other seeds."""
        return self.task, self.variant, self.point


def point_words(point: Point) -> list[str]:
    """`max_rows 250` for (("data.max_rows", 250),): the last part of each key with its value."""
    return [f"{key.rsplit('.', 1)[-1]} {'default' if value is None else value}" for key, value in point]


def ready_made_experiments() -> list[str]:
    """Names of the experiments that come with the package."""
    return ready_made_configs("experiments")


def load_experiment(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment by path or ready-made name.

    An override `key=value` changes the experiment if the key is one of its own (`seeds=[0]`), otherwise the config of
    every run (`train.max_steps=50`); `+paper_t5` applies an overlay to every run. Raises InputError when there is no
    such file, ConfigError with file and line for an error in it.
    """
    check_name(name)
    path = Path(name)
    if not path.is_file():
        if name not in ready_made_experiments():
            known = ", ".join(ready_made_experiments())
            raise InputError("no such experiment file or ready-made experiment", f"ready-made ones: {known}", path=name)
        path = Path(str(resources.files("pst_dist") / "config" / "presets" / "experiments" / f"{name}.yaml"))
    tree, lines = read_yaml(path)
    origins: dict[tuple[str, ...], dict[str, Any]] = {}
    for word in overrides:
        if word.startswith("+"):
            tree["recipe"] = [*(tree.get("recipe") or []), word]
            continue
        keys, value = parse_override(word)
        if keys[0] in Experiment.model_fields:
            set_key(tree, keys, value)
            origins[keys] = {}
        else:
            refuse_misspelt([word], Experiment.model_fields)
            tree["overrides"] = {**(tree.get("overrides") or {}), ".".join(keys): value}
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        raise explain(error, path, lines, origins, keys=set(known_keys(Experiment))) from error


def runs_of(experiment: Experiment) -> list[Run]:
    """Every run, ordered by seed, so that a stopped experiment has results for as many variants as possible.

    Raises ConfigError, naming task and variant, for keys that do not make a valid config, for labels that would share a
    directory, and when no run is left.
    """
    bases = {task: _begin(task, experiment) for task in experiment.tasks}
    runs: list[Run] = []
    trained: dict[str, list[str]] = {}
    rows: dict[str, str] = {}
    for seed, (task, base), point, (variant, keys) in itertools.product(
        experiment.seeds, bases.items(), experiment.points, experiment.variants.items()
    ):
        if not experiment.includes(task, variant, seed):
            continue
        config = _config(experiment, task, base, variant, keys, point, seed)
        # Tasks with the same rows share the data of the first of them: embedding may take longer than training.
        digest = _rows_of(config)
        data = rows.setdefault(digest, f"{_slug(task)}-{digest[:8]}")
        config = config.model_copy(update={"data_dir": str(experiment.path / "data" / data)})
        runs.append(Run(task, variant, point, seed, config, tuple(trained.setdefault(_training_of(config), []))))
        trained[_training_of(config)].append(config.output_dir)
    if not runs:
        raise ConfigError("no task is run with any of the seeds", "see tasks.*.seeds and seeds")
    folders: dict[str, Run] = {}
    for run in runs:
        other = folders.setdefault(run.config.output_dir, run)
        if other is not run:
            raise ConfigError(f"{run.name} and {other.name} would share a directory", "use more distinct labels")
    return runs


def _training_of(config: Config) -> str:
    """Digest of all settings that affect training: not the directory and not the evaluation."""
    return digest_of(config.model_dump(mode="json", exclude={"output_dir", "evaluate"}))


def _begin(task: str, experiment: Experiment) -> dict[str, Any]:
    """The keys that all runs of a task start from."""
    keys = experiment.tasks[task]
    name = keys.get(_BEGIN)
    tree = load_tree(None if name is None else str(name), experiment.overlays)
    for own in _OWN:
        tree.pop(own, None)
    _put(tree, experiment.settings, "settings")
    _put(tree, {key: value for key, value in keys.items() if key not in (_BEGIN, *_ONLY)}, f"tasks.{task}")
    lay_over(tree, experiment.recipe)
    return tree


def _config(
    experiment: Experiment,
    task: str,
    base: Mapping[str, Any],
    variant: str,
    keys: Mapping[str, Any],
    point: Point,
    seed: int,
) -> Config:
    tree = _copied(base)
    _put(tree, dict(point), "vary")
    _put(tree, keys, f"variants.{variant}")
    _put(tree, experiment.overrides, "overrides")
    folder = "/".join(["runs", _slug(task), *(_slug(word) for word in point_words(point)), _slug(variant)])
    tree |= {"seed": seed, "output_dir": str(experiment.path / folder / f"seed-{seed}")}
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        reason = explain(error, None, {}, {})
        raise ConfigError(f"task {task}, variant {variant}: {reason.what}", reason.remedy) from error
    return config


def _rows_of(config: Config) -> str:
    """Digest of all settings that the shards and embeddings depend on."""
    vectors = {"encoder", "revision", "prefix", "max_seq_length", "dtype"}
    # Later settings, only where they are set: the folders of earlier experiments keep their names.
    vectors |= {name for name in ("truncate_dim", "layer", "pooling") if getattr(config.embed, name) is not None}
    rows = {
        "task": config.task,
        "data": config.data.model_dump(mode="json"),
        "shards": config.shards.model_dump(mode="json", exclude={"workers"}),
        "embed": config.embed.model_dump(mode="json", include=vectors),
    }
    return digest_of(rows)


def _put(tree: dict[str, Any], keys: Mapping[str, Any], where: str) -> None:
    """Write keys, dotted or nested, into a tree; raises ConfigError for keys that the experiment sets itself."""
    for key, value in flat_keys(keys).items():
        if key in _OWN:
            remedy = f"write seeds=[{value}]" if key == "seed" and where == "overrides" else "remove it"
            raise ConfigError(f"{where}.{key}: an experiment sets this for each run", remedy)
        try:
            set_key(tree, tuple(key.split(".")), value)
        except PstError as error:
            raise ConfigError(f"{where}.{key}: {error.what}", error.remedy) from error


def _copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def _slug(label: str) -> str:
    """A label as a directory name."""
    return re.sub(r"[^A-Za-z0-9_.=-]+", "-", label).strip("-.") or "run"
