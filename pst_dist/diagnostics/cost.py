"""Estimates what a run will cost: steps, memory per rank, checkpoints, embeddings, and how often to save.

Arithmetic on the config and the rows, without torch; every rule names its source. A speed comes from
`diagnostics.measure`, from a table of GPUs or from the user; without any the plan says how to get one.
"""

# Letters in this file: P parameters (the student's and the alignment head's), N ranks

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from pst_dist.arms import ARMS, Segment
from pst_dist.config.run_dir import run_dir
from pst_dist.config.schema import Config, Section
from pst_dist.diagnostics.gpus import GPUS, GpuName, table_speed
from pst_dist.diagnostics.model_size import ModelShape, adapter_parameters, shape_of
from pst_dist.diagnostics.optimizer_memory import optimizer_bytes
from pst_dist.errors import ConfigError, InputError
from pst_dist.models.load import load_model_config
from pst_dist.models.locate import is_gguf, locate_model
from pst_dist.storage.foreign_json import MOST_WHOLE, foreign_object, whole_number
from pst_dist.student.layout import forward_passes
from pst_dist.student.prompt import AUTO, FRESH_PROMPT
from pst_dist.training.deepspeed_config import MOST_BUCKET_ELEMENTS, find_deepspeed_json, is_stage, shown

GIB = 2**30
_CHARACTERS_A_TOKEN = 4.0
_NF4_BYTES = 0.516
"""Bytes a weight in NF4 with double quantisation: 4.127 bits (Dettmers et al., arXiv 2305.14314, section 3)."""
_BASE_BYTES = 34
"""Bytes of activations per token, layer and unit of width in 16 bits, without attention scores (Korthikanti et al.,
arXiv 2205.05198, equation 1 without its second term, which flash or memory-efficient attention does not store)."""


class Machines(Section):
    """The machines for the run: the arguments of `pst plan` that are not keys of the config."""

    nodes: int = Field(1, ge=1)
    """Machines."""
    gpus: int = Field(1, ge=1)
    """Ranks per machine: GPUs, or CPU ranks."""
    gpu: GpuName | None = None
    """The GPU, for its memory and a guess of its speed from a table."""
    gpu_memory: float | None = Field(None, gt=0)
    """Memory of one GPU in GiB; the plan then says whether a rank fits."""
    tokens_per_second: float | None = Field(None, gt=0)
    """Training speed of one rank, from the log of a short run."""
    texts_per_second: float | None = Field(None, gt=0)
    """Speed of one encoder, from `pst embed` or benchmarks/embed_throughput.py."""
    write_gb_per_second: float = Field(1.0, gt=0)
    """Write speed of the shared file system for all ranks together, in GB/s."""
    node_hours_between_failures: float = Field(6300.0, gt=0)
    """Mean time between failures of one node. 6300 h is Llama 3's pre-training: 419 unexpected interruptions in 54
    days of 2048 nodes of 8 GPUs (arXiv 2407.21783, section 3.3.4)."""


@dataclass(frozen=True)
class Rows:
    """Counts of the training rows."""

    rows: int
    texts: int
    """Rationales to embed."""
    tokens: float
    """Tokens of all training sequences of one epoch."""
    shard_bytes: int
    exact: bool
    """Whether tokens are counted; otherwise they are estimated at four characters each."""
    slots: int = 0
    """Samples of one epoch: the rows, in a mixture as often as their weights say."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank needs for training."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss_path: float
    buffers: float = 0.0
    """Buckets that collect gradients before they are sent between ranks."""

    @property
    def states(self) -> float:
        """Weights, gradients and optimizer together."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.states + self.buffers + self.activations + self.loss_path


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
    memory: RankMemory
    by_stage: dict[int, RankMemory]
    checkpoint_bytes: float
    checkpoint_seconds: float
    training_hours: float | None
    embedding_hours: float | None
    embedding_bytes: float
    failures: float | None
    """Expected number over the whole training."""
    save_every_seconds: float
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


def make_plan(config: Config, machines: Machines, *, tokens_per_row: float | None = None) -> Plan:
    """Compute the plan, with the measured `tokens_per_row` of an epoch where given.

    Raises what reading the rows or the student's config raises.
    """
    train, ranks = config.train, machines.nodes * machines.gpus
    if ranks > 1 and train.deepspeed is None:
        raise ConfigError(f"{ranks} ranks but train.deepspeed is not set", "add train.deepspeed=zero1, zero2 or zero3")
    stage = zero_stage(train.deepspeed)
    rows = count_rows(config)
    if tokens_per_row is not None:
        rows = replace(rows, tokens=tokens_per_row * rows.rows, exact=True)
    shape = shape_of(config.student, max_length=config.layout.max_length)
    aligned = ARMS[config.arm].aligned and config.loss.alignment_weight > 0
    width = teacher_width(config) if aligned else 0
    head = shape.hidden_size * width
    added = adapter_parameters(config) if config.student.lora.rank else 0
    parameters = shape.parameters + added + head
    trained = added + head if added else parameters
    machines = _with_table(machines, config, parameters, trained)
    global_batch = train.global_batch_size or (
        train.per_device_train_batch_size * (train.gradient_accumulation_steps or 1) * ranks
    )
    steps = train.max_steps or train.num_train_epochs * math.ceil((rows.slots or rows.rows) / global_batch)
    micro_tokens, passes = forward_size(config, rows, math.ceil(global_batch / ranks))
    memories = {
        number: rank_memory(config, shape, parameters, number, ranks, micro_tokens=micro_tokens, trained=trained)
        for number in (0, 1, 2, 3)
    }
    memory = memories[stage] if stage is not None else replace(memories[0], buffers=0.0)
    size = checkpoint_bytes(trained, optimizer_bytes(config, shape, trained))
    seconds = size / (machines.write_gb_per_second * 1e9)
    tokens = rows.tokens * steps * global_batch / max(1, rows.rows)
    hours = None if machines.tokens_per_second is None else tokens / (machines.tokens_per_second * ranks) / 3600
    between = machines.node_hours_between_failures / machines.nodes * 3600
    interval = math.sqrt(2 * seconds * between)
    return Plan(
        config=config,
        machines=machines,
        shape=shape,
        parameters=parameters,
        trained=trained,
        rows=rows,
        steps=steps,
        global_batch=global_batch,
        micro_batches=passes,
        memory=memory,
        by_stage=memories,
        checkpoint_bytes=size,
        checkpoint_seconds=seconds,
        training_hours=hours,
        embedding_hours=(
            rows.texts / (machines.texts_per_second * ranks) / 3600 if machines.texts_per_second else None
        ),
        embedding_bytes=4.0 * rows.texts * width,
        failures=None if hours is None else hours * 3600 / between,
        save_every_seconds=interval,
        save_every_steps=None if not hours else max(1, round(interval / (hours * 3600 / steps))),
    )


def _with_table(machines: Machines, config: Config, parameters: int, trained: int) -> Machines:
    """The machines with memory and speed of `machines.gpu`; what was given or measured stays."""
    if machines.gpu is None:
        return machines
    memory = machines.gpu_memory or GPUS[machines.gpu].memory_gib
    if machines.tokens_per_second is not None:  # the table's speed is not used, and the page does not name it
        return machines.model_copy(update={"gpu": None, "gpu_memory": memory})
    speed = table_speed(machines.gpu, config, parameters, trained)
    return machines.model_copy(update={"gpu_memory": memory, "tokens_per_second": speed})


def forward_size(config: Config, rows: Rows, per_rank: int) -> tuple[int, int]:
    """(most tokens of a forward pass on one rank, passes of a step), for `per_rank` rows of a step.

    The longest row of a pass is taken to be half as long again as the mean one.
    """
    train = config.train
    mean = rows.tokens / max(1, rows.rows)
    longest = min(config.layout.max_length, math.ceil(1.5 * mean))
    size = min(train.per_device_train_batch_size, per_rank)
    tokens, passes = size * longest, math.ceil(per_rank / size) * len(forward_passes(ARMS[config.arm], []))
    if isinstance(train.micro_batch_tokens, int):
        limit = max(train.micro_batch_tokens, longest)  # a longer row has a pass of its own
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


def zero_stage(deepspeed: str | None) -> int | None:
    """The stage of a profile or DeepSpeed JSON; None for the single-process engine."""
    if deepspeed is None:
        return None
    stage = _zero_section(deepspeed).get("stage", 0)
    if not is_stage(stage):
        raise ConfigError(
            f"train.deepspeed: cannot read the ZeRO stage: it is {shown(stage)}", "use 0, 1, 2 or 3", path=deepspeed
        )
    return int(stage)


def _zero_section(deepspeed: str | None) -> dict[str, Any]:
    """`zero_optimization` of a profile or DeepSpeed JSON; raises ConfigError when it cannot be read."""
    if deepspeed is None:
        return {}
    try:
        section = foreign_object(find_deepspeed_json(deepspeed)).get("zero_optimization", {})
    except InputError as error:
        raise ConfigError(f"train.deepspeed: cannot read the ZeRO stage: {error.what}", path=deepspeed) from error
    return section if isinstance(section, dict) else {}


def rank_memory(
    config: Config,
    shape: ModelShape,
    parameters: int,
    stage: int,
    ranks: int,
    *,
    micro_tokens: int,
    trained: int | None = None,
) -> RankMemory:
    """Memory of one rank at a ZeRO stage (Rajbhandari et al., arXiv 1910.02054, section 3; Adam's K is 12 bytes).

    float32 training needs 4 bytes each for weights and gradients; DeepSpeed's stages 1 to 3 keep a float32 copy of
    their share in addition to Adam's two moments. bf16 at stage 1 and above halves weights and gradients. Only
    `trained` parameters (all by default) have gradients and optimizer state.
    """
    bf16 = config.train.bf16 is True
    item = 2.0 if bf16 or config.train.fp16 else 4.0
    half = bf16 and stage >= 1
    trained = parameters if trained is None else trained
    each, p, n = (2.0 if half else 4.0), float(trained), float(ranks)
    frozen = _frozen_bytes(config, shape, parameters - trained, each)
    per_layer = _BASE_BYTES * item / 2 * micro_tokens * shape.hidden_size
    activations = shape.layers * per_layer
    if config.student.gradient_checkpointing:
        # The input of each layer, and the activations of the one layer being recomputed.
        activations = shape.layers * item * micro_tokens * shape.hidden_size + per_layer
    # The head's gradient in float32 and a chunk of logits (`kernels.ops.CHUNK_BYTES` on a CPU).
    # LoRA has no gradient of the head.
    gradient = 0.0 if config.student.lora.rank else 4.0 * shape.vocabulary * shape.hidden_size
    loss_path = gradient + min(64 * 2**20, item * micro_tokens * shape.vocabulary)
    return RankMemory(
        weights=(each * p + frozen) / (n if stage == 3 else 1),
        gradients=each * p / (n if stage >= 2 else 1),
        optimizer=optimizer_bytes(config, shape, trained) if stage == 0 else 12.0 * p / n,
        activations=activations,
        loss_path=loss_path,
        buffers=each * _bucket_elements(config.train.deepspeed, trained, stage),
    )


def _frozen_bytes(config: Config, shape: ModelShape, frozen: int, each: float) -> float:
    """Bytes of frozen weights; in 4 bits all but the embeddings, with scales of half a bit a weight or less."""
    lora = config.student.lora
    if frozen and lora.frozen_dtype == "bfloat16":
        each = 2.0
    embeddings = min(frozen, shape.vocabulary * shape.hidden_size) if lora.quantize else frozen
    return each * embeddings + _NF4_BYTES * (frozen - embeddings)


def _bucket_elements(deepspeed: str | None, parameters: int, stage: int) -> float:
    """Elements of DeepSpeed's gradient buckets: two at stages 1 and 2 where communication overlaps, one at stage 3.

    A bucket has as many elements as the student, at most half a billion, unless the JSON sets another size. Without
    ZeRO, gradients are copied into one bucket of that size once per step.
    """
    # The table's other stages assume our own profiles, in which communication overlaps.
    given = _zero_section(deepspeed) if zero_stage(deepspeed) == stage else {"overlap_comm": True}
    size = given.get("reduce_bucket_size")
    each = float(size if isinstance(size, int) and 0 < size <= MOST_WHOLE else min(MOST_BUCKET_ELEMENTS, parameters))
    return each * (2 if stage in (1, 2) and given.get("overlap_comm") else 1)


def checkpoint_bytes(parameters: int, optimizer: float | None = None) -> float:
    """Bytes of one checkpoint over all ranks: float32 weights, and the optimizer's state (default: Adam's moments)."""
    return 4 * parameters + (8 * parameters if optimizer is None else optimizer)


def count_rows(config: Config) -> Rows:
    """Count the training rows in the shards, or in the sources if nothing is packed; raises what those raise."""
    from pst_dist.data.shards import ShardSet
    from pst_dist.data.sources.mixture import parts_of

    run = run_dir(config)
    if (run.shards / "manifest.json").is_file():
        shards = ShardSet.open(run.shards, verify=False)
        samples: Any = shards.split("train")
        size = sum(shard.bytes for shard in shards.shards())
    else:
        from pst_dist.data.sources import load_data

        samples = load_data(config).splits.get("train", [])
        size = 0
    arm = ARMS[config.arm]
    reads = config.loss.rationale_weight > 0 or (config.loss.pooling == "span" and arm.aligned)
    exact = config.student.model_name_or_path is None and config.student.fresh.tokenizer == "byte"
    a_token = 1.0 if exact else _CHARACTERS_A_TOKEN
    template = FRESH_PROMPT if config.layout.prompt == AUTO else config.layout.prompt  # a guess, without the tokenizer
    prompt = len(template) - len("{question}") + 3  # the space before an answer, its stop, the end
    tokens, texts = 0.0, 0
    for sample in samples:
        written = len(sample.rationales[0].encode()) if arm.needs_rationale and reads and sample.rationales else 0
        once = len(sample.question.encode()) + prompt + len(sample.answer.encode())
        for asked in arm.asked:
            size_of_one = once + (written if Segment.RATIONALE in asked.order else 0)
            tokens += min(config.layout.max_length, size_of_one / a_token) + (Segment.SEMANTIC in asked.order)
        texts += len(sample.rationales)
    counts = Counter(sample.part for sample in samples)
    weights = {name: source.weight for name, source in zip(parts_of(config), config.data.mixture, strict=True)}
    slots = sum(max(1, round(rows * weights.get(name, 1))) for name, rows in counts.items())
    return Rows(len(samples), texts, tokens, size or round(tokens * a_token), exact, slots)
