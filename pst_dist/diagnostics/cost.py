"""Estimates what a run will cost: steps, memory per rank, checkpoints, embeddings, and how often to save.

Arithmetic on the config and the rows, without torch; every rule names its source. A speed comes from
`diagnostics.measure`, from a table of GPUs or from the user; without any the plan says how to get one.
"""

# Letters in this file: P parameters (the student's and the alignment head's), N ranks

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from pst_dist.arms import ARMS
from pst_dist.config.schema import Config, Section
from pst_dist.config.zero import zero_stage
from pst_dist.diagnostics.counted_rows import ReadRows, Rows, count_rows, longest_row
from pst_dist.diagnostics.gpus import GPUS, GpuName, table_speed
from pst_dist.distributed.device_memory import GIB
from pst_dist.errors import ConfigError, InputError
from pst_dist.models.load import load_model_config
from pst_dist.models.locate import is_gguf, locate_model
from pst_dist.storage.foreign_json import foreign_object, whole_number
from pst_dist.student.layout import forward_passes
from pst_dist.training.memory.model_size import ModelShape, adapter_parameters, shape_of
from pst_dist.training.memory.optimizer_memory import optimizer_bytes
from pst_dist.training.memory.pass_limit import PassLimit, cuts_by_memory, pass_limit
from pst_dist.training.memory.training_memory import HostMemory, RankMemory, host_memory, rank_memory


class Machines(Section):
    """The machines for the run: the arguments of `pst plan` that are not keys of the config."""

    nodes: int = Field(1, ge=1)
    """Number of machines."""
    gpus: int = Field(1, ge=1)
    """Ranks per machine: one per GPU, or CPU ranks."""
    gpu: GpuName | None = Field(
        None, description=f"The GPU model, to look up its memory and estimate its speed: {', '.join(GPUS)}."
    )
    gpu_memory: float | None = Field(None, gt=0)
    """Memory of one GPU in GiB; with it, the plan says whether a rank fits."""
    tokens_per_second: float | None = Field(None, gt=0)
    """Training speed of one rank, from the log of a short run."""
    texts_per_second: float | None = Field(None, gt=0)
    """Speed of one encoder process, from `pst embed` or benchmarks/embed_throughput.py."""
    write_gb_per_second: float = Field(1.0, gt=0)
    """Write speed of the shared file system for all ranks together, in GB/s."""
    node_hours_between_failures: float = Field(6300.0, gt=0)
    """Mean time between failures of one node. The default is that of Llama 3's pre-training: 419 unexpected
    interruptions in 54 days on 2048 nodes of 8 GPUs (arXiv 2407.21783, section 3.3.4)."""

    @field_validator("gpu", mode="before")
    @classmethod
    def _in_lower_case(cls, value: object) -> object:
        """`gpu=H100` is the same."""
        return value.lower() if isinstance(value, str) else value


@dataclass(frozen=True)
class Plan:
    """The estimate; times are None if no speed was given."""

    config: Config
    machines: Machines
    shape: ModelShape
    parameters: int
    trained: int
    """Parameters that the optimizer moves: all of them, or a LoRA student's adapters, added rows and alignment head."""
    rows: Rows
    steps: int
    global_batch: int
    micro_batches: int
    """Forward passes per rank in one step. One process on a CPU may make more, to save padding."""
    pass_limit: PassLimit | None
    """What `train.micro_batch_tokens=auto` stands for on this GPU; None without one, or where the config says more."""
    memory: RankMemory
    by_stage: dict[int, RankMemory]
    host: HostMemory
    checkpoint_bytes: float
    checkpoint_seconds: float
    training_hours: float | None
    embedding_hours: float | None
    embedding_bytes: float
    failures: float | None
    """Expected number over the whole training."""
    save_every_seconds: float
    """At most the length of the training, where that is known."""
    save_every_steps: int | None

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.machines.nodes * self.machines.gpus


def split_words(words: list[str]) -> tuple[list[str], Machines]:
    """Split command-line arguments into config overrides and the machines; raises ConfigError."""
    ours = [word for word in words if word.partition("=")[0] in Machines.model_fields]
    given = dict(word.partition("=")[::2] for word in ours)
    try:
        machines = Machines.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigError(f"{name}={given[name]!r}: {first['msg'].lower()}", "see `pst plan --help`") from error
    return [word for word in words if word not in ours], machines


def make_plan(
    config: Config, machines: Machines, *, tokens_per_row: float | None = None, read: ReadRows | None = None
) -> Plan:
    """Compute the plan, with the measured `tokens_per_row` of an epoch where given; `read` gives the rows.

    Raises what reading the rows or the student's config raises.
    """
    train, ranks = config.train, machines.nodes * machines.gpus
    if ranks > 1 and train.deepspeed is None:
        raise ConfigError(f"{ranks} ranks but train.deepspeed is not set", "add train.deepspeed=zero1, zero2 or zero3")
    stage = zero_stage(train.deepspeed)
    rows = count_rows(config, read)
    if tokens_per_row is not None:
        rows = replace(rows, tokens=tokens_per_row * rows.rows, exact=True)
    student = _student(config)
    machines = _with_table(machines, config, student.parameters, student.trained)
    global_batch = train.global_batch_size or (
        train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1) * ranks
    )
    steps = train.max_steps or train.num_train_epochs * math.ceil((rows.slots or rows.rows) / global_batch)
    passes = _passes(config, machines, student, rows, math.ceil(global_batch / ranks), stage)
    tokens = rows.tokens * steps * global_batch / max(1, rows.rows)
    hours = None if machines.tokens_per_second is None else tokens / (machines.tokens_per_second * ranks) / 3600
    texts = machines.texts_per_second
    size = checkpoint_bytes(student.trained, optimizer_bytes(config, student.shape, student.trained))
    saving = _saving(machines, size, steps, hours)
    return Plan(
        config=config,
        machines=machines,
        shape=student.shape,
        parameters=student.parameters,
        trained=student.trained,
        rows=rows,
        steps=steps,
        global_batch=global_batch,
        micro_batches=passes.count,
        pass_limit=passes.limit,
        memory=passes.memory,
        by_stage=passes.by_stage,
        host=host_memory(config, student.shape, student.parameters, student.trained, stage, ranks),
        checkpoint_bytes=size,
        checkpoint_seconds=saving.seconds,
        training_hours=hours,
        embedding_hours=rows.texts / (texts * ranks) / 3600 if texts else None,
        embedding_bytes=4.0 * rows.texts * student.teacher_width,
        failures=saving.failures,
        save_every_seconds=saving.every_seconds,
        save_every_steps=saving.every_steps,
    )


@dataclass(frozen=True)
class _Student:
    """The sizes of a student and its alignment head."""

    shape: ModelShape
    parameters: int
    trained: int
    teacher_width: int
    """0 where nothing is aligned."""


def _student(config: Config) -> _Student:
    shape = shape_of(config.student, max_length=config.layout.max_length)
    aligned = ARMS[config.arm].aligned and config.loss.alignment_weight > 0
    width = teacher_width(config) if aligned else 0
    head = shape.hidden_size * width
    added = adapter_parameters(config) if config.student.lora.rank else 0
    parameters = shape.parameters + added + head
    return _Student(shape, parameters, added + head if added else parameters, width)


@dataclass(frozen=True)
class _Passes:
    """The forward passes of a step on one rank, and the memory that they need."""

    count: int
    limit: PassLimit | None
    memory: RankMemory
    by_stage: dict[int, RankMemory]


def _passes(
    config: Config, machines: Machines, student: _Student, rows: Rows, per_rank: int, stage: int | None
) -> _Passes:
    """For `per_rank` rows of a step; `stage` is None for a single process, which has no buckets."""
    ranks, shape, parameters = machines.nodes * machines.gpus, student.shape, student.parameters
    limit = None
    if machines.gpu_memory is not None and cuts_by_memory(config):
        most = machines.gpu_memory * GIB
        limit = pass_limit(config, shape, parameters, trained=student.trained, stage=stage, ranks=ranks, memory=most)
    micro_tokens, count = forward_size(config, rows, per_rank, limit.tokens if limit is not None else None)
    by_stage = {
        number: rank_memory(
            config,
            shape,
            parameters,
            number,
            ranks,
            micro_tokens=micro_tokens,
            trained=student.trained,
            longest=longest_row(config, rows),
            prompt_share=rows.prompt_share,
            on_gpu=machines.gpu_memory is not None,
        )
        for number in (0, 1, 2, 3)
    }
    memory = by_stage[stage] if stage is not None else replace(by_stage[0], buffers=0.0)
    return _Passes(count, limit, memory, by_stage)


@dataclass(frozen=True)
class _Saving:
    """How long a checkpoint takes, and how often one should be saved."""

    seconds: float
    failures: float | None
    every_seconds: float
    every_steps: int | None


def _saving(machines: Machines, checkpoint: float, steps: int, hours: float | None) -> _Saving:
    """For checkpoints of that many bytes; the interval is Young's, the square root of twice cost times failure time."""
    seconds = checkpoint / (machines.write_gb_per_second * 1e9)
    between = machines.node_hours_between_failures / machines.nodes * 3600
    interval = math.sqrt(2 * seconds * between)
    if hours is None:
        return _Saving(seconds, None, interval, None)
    interval = min(interval, hours * 3600)
    every = min(steps, max(1, round(interval / (hours * 3600 / steps)))) if hours else None
    return _Saving(seconds, hours * 3600 / between, interval, every)


def _with_table(machines: Machines, config: Config, parameters: int, trained: int) -> Machines:
    """The machines with memory and speed of `machines.gpu`; what was given or measured stays."""
    if machines.gpu is None:
        return machines
    memory = machines.gpu_memory or GPUS[machines.gpu].memory_gib
    if machines.tokens_per_second is not None:  # the table's speed is not used, and the page does not name it
        return machines.model_copy(update={"gpu": None, "gpu_memory": memory})
    speed = table_speed(machines.gpu, config, parameters, trained)
    return machines.model_copy(update={"gpu_memory": memory, "tokens_per_second": speed})


def forward_size(config: Config, rows: Rows, per_rank: int, auto: int | None = None) -> tuple[int, int]:
    """(most tokens of a forward pass on one rank, passes of a step), for `per_rank` rows of a step.

    Every row of a pass is padded to the longest one. `auto` is the limit that `auto` stands for.
    """
    train = config.train
    mean, longest = rows.tokens / max(1, rows.rows), longest_row(config, rows)
    size = min(train.per_device_train_batch_size, per_rank)
    tokens, passes = size * longest, math.ceil(per_rank / size) * len(forward_passes(ARMS[config.arm], []))
    asked = auto if train.micro_batch_tokens == "auto" else train.micro_batch_tokens
    if asked is not None:
        limit = max(asked, longest)  # a longer row has a pass of its own
        tokens, passes = min(tokens, limit), max(passes, math.ceil(per_rank * mean / limit))
    return tokens, passes


def teacher_width(config: Config) -> int:
    """Width of the encoder's vectors: MiniLM's, or from another encoder's config.json; 1024 if that is missing."""
    if config.embed.encoder == "minilm":
        return 384
    if is_gguf(config.embed.encoder):
        return int(load_model_config(locate_model(config.embed.encoder), "the encoder").hidden_size)
    try:
        path = Path(config.embed.encoder).expanduser() / "config.json"
        return whole_number(foreign_object(path), "hidden_size", path)
    except (InputError, KeyError):
        return 1024


def checkpoint_bytes(parameters: int, optimizer: float | None = None) -> float:
    """Bytes of one checkpoint over all ranks: float32 weights, and the optimizer's state (default: Adam's moments)."""
    return 4 * parameters + (8 * parameters if optimizer is None else optimizer)
