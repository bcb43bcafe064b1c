"""All settings in one place: typed, validated, printable, and saved with each run.

A config is YAML plus `key.sub=value` overrides. The YAML overrides the defaults below, and the command line overrides
the YAML. An unknown key is refused, with the closest known key as a suggestion. Keys that mean the same as a Hugging
Face argument have its name. `loading` parses the text, and `explain` locates errors in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from pst_dist.arms import ARMS
from pst_dist.config.schema_data import DataConfig, EmbedConfig, RayConfig, RowSource, ShardConfig
from pst_dist.config.schema_student import FreshConfig, LayoutConfig, LoraConfig, LossConfig, StudentConfig
from pst_dist.config.schema_train import RayTrainConfig, TrainConfig
from pst_dist.config.section import Folder, Place, Plain, Positive, Section

__all__ = [
    "Config",
    "DataConfig",
    "EmbedConfig",
    "EvaluateConfig",
    "FreshConfig",
    "LayoutConfig",
    "LoraConfig",
    "LossConfig",
    "RayConfig",
    "RayTrainConfig",
    "RowSource",
    "Section",
    "ShardConfig",
    "StudentConfig",
    "TrainConfig",
]

if TYPE_CHECKING:
    ArmName = str
else:
    ArmName = Literal[tuple(ARMS)]  # pydantic checks the names and lists them in the schema


class EvaluateConfig(Section):
    """Decoding and scoring."""

    split: Literal["test", "validation"] = "test"
    """Split to score."""
    max_rows: Positive | None = None
    """Score at most this many rows (those with the smallest id hashes)."""
    batch_size: Positive = 64
    """Questions per decoding batch."""
    batch_tokens: Positive | None = None
    """Maximum tokens per decoding batch: number of questions times (longest prompt + max_new_tokens). This limits the
    memory that long prompts need; questions are sorted by length. null limits only the number of questions, and on a
    GPU a batch is halved until it fits in 70 % of the free memory (an estimate, not run on a GPU). A batch that runs
    out of memory is decoded in halves; answers differ only by rounding."""
    max_new_tokens: Positive = 256
    """Maximum number of tokens generated per question."""
    bf16: bool | Literal["auto"] = "auto"
    """Decode in bfloat16. `auto` uses bfloat16 on a GPU if training used it, and float32 on a CPU."""
    rationale: Literal["own", "teacher", "wrong"] = "own"
    """Rationale that precedes the answer in arm pre_thinking: its own, the teacher's, or that of another scored row. No
    effect on arms that answer first."""
    think_below: Annotated[float, Field(ge=0)] | None = None
    """Arm `adaptive` only: think first when the probability of the immediate answer is below this value (0 never,
    2 always). Default: chosen on the validation rows."""
    latency_rows: Annotated[int, Field(ge=0)] = 20
    """Number of questions to decode one at a time to measure the time to the answer in milliseconds."""
    latency_seconds: Annotated[float, Field(gt=0)] = 60
    """Stop the latency measurement after this many seconds; the results say how many questions were measured."""
    explain_rows: Annotated[int, Field(ge=0)] = 50
    """Number of questions for which the rationale is also generated and compared with the teacher's."""
    backend: Literal["local", "ray"] = "local"
    """`local`: this process, or all ranks of a launcher (`torchrun … -m pst_dist evaluate`); `ray`: actors on a Ray
    cluster; all its machines must see the run directory."""
    ray: RayConfig = RayConfig()
    """Actors for backend ray. Where no address is given, that of train.ray."""


class Config(Section):
    """A complete run: data, embeddings, student, loss, training and evaluation."""

    task: Plain | None = None
    """One of the 12 tasks or a demo task; decides how answers are normalised and scored. Default: the rules of
    data.answer_type."""
    arm: ArmName = Field(
        default="pst",
        description="The student to train. "
        + " ".join(f"{arm.name}: {arm.description.removeprefix('trained ')}." for arm in ARMS.values()),
    )
    arms: list[ArmName] = []
    """Several arms to train on identical rows. `pst run` trains each one in output_dir/ARM and compares them."""
    output_dir: Annotated[Folder, Field(min_length=1)] = "runs/run"
    """The run directory. All outputs are written below it."""
    data_dir: Place | None = None
    """Where shards and embeddings are stored, so that runs can share them: a folder, or object storage through fsspec
    (`s3://bucket/path`, `gs://bucket/path`). Default: output_dir/data."""
    data_cache: Folder | None = None
    """For rows, shards and embeddings in object storage: the local folder to which each machine downloads them once.
    Default: the data directory, or output_dir/data if that is in object storage."""
    seed: int = 0
    """Seed of the initial weights and the row order. Splits do not depend on it: the hash of a row's id decides
    them."""
    data: DataConfig = DataConfig()
    """Rows and columns."""
    shards: ShardConfig = ShardConfig()
    """How samples are packed into shards."""
    embed: EmbedConfig = EmbedConfig()
    """Embeddings of the teacher rationales."""
    layout: LayoutConfig = LayoutConfig()
    """How samples become token sequences."""
    student: StudentConfig = StudentConfig()
    """The model to train."""
    loss: LossConfig = LossConfig()
    """Loss terms and their weights."""
    train: TrainConfig = TrainConfig()
    """Optimisation, checkpoints and logging."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Decoding and scoring."""

    @model_validator(mode="after")
    def _rate_follows_student(self) -> Config:
        if "learning_rate" not in self.train.model_fields_set:
            chosen = self.train.model_copy(update={"learning_rate": self.student.learning_rate})
            object.__setattr__(self, "train", chosen)  # sections are frozen for everyone but their validators
        return self

    @model_validator(mode="after")
    def _mixture_agrees(self) -> Config:
        for key in ("validation", "test", "split_file", "teacher_completions") if self.data.mixture else ():
            if getattr(self.data, key) is not None:
                raise ValueError(f"data.{key} belongs to one source of the mixture: write it into that source")
        return self

    @model_validator(mode="after")
    def _fields_agree(self) -> Config:
        train = self.train
        if train.global_batch_size is not None and train.gradient_accumulation_steps is not None:
            raise ValueError(
                "train.gradient_accumulation_steps is computed from train.global_batch_size: to set it, also set "
                "train.global_batch_size=null"
            )
        workers = train.ray.num_workers if train.backend == "ray" else 1
        if workers > 1 and train.deepspeed is None:
            raise ValueError(f"train.ray.num_workers={workers} needs train.deepspeed: set it to zero1, zero2 or zero3")
        if train.ray.min_workers is not None and train.ray.min_workers > train.ray.num_workers:
            raise ValueError(
                f"train.ray.min_workers={train.ray.min_workers} is more than num_workers={train.ray.num_workers}"
            )
        if self.loss.pooling == "span" and ARMS[self.arm].aligned and self.layout.semantic_tokens > 1:
            raise ValueError("loss.pooling=span uses no semantic tokens: set layout.semantic_tokens=1")
        if self.loss.alignment != "info_nce" and (self.loss.negatives or self.loss.symmetric):
            raise ValueError(
                f"loss.negatives and loss.symmetric have no effect with loss.alignment={self.loss.alignment}"
            )
        if self.loss.symmetric and isinstance(train.micro_batch_tokens, int):
            raise ValueError(
                "train.micro_batch_tokens cuts forward passes by length, and loss.symmetric compares the rows of one "
                "pass: set train.micro_batch_tokens=auto, which keeps the order in which rows are drawn"
            )
        if self.loss.whiten and not self.loss.centre:
            raise ValueError("loss.whiten needs loss.centre: variance is measured around the mean")
        if self.loss.alignment_share is not None and self.loss.alignment_weight != 1:
            raise ValueError(
                f"loss.alignment_share sets the weight itself, so loss.alignment_weight={self.loss.alignment_weight:g} "
                "cannot be set too: remove one of them (loss.alignment_share=null)"
            )
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("arms names an arm twice")
        if self.student.warm_start is not None and self.student.model_name_or_path is None:
            raise ValueError("student.warm_start needs an encoder, for example student.model_name_or_path=minilm")
        self._lora_fits()
        self._optimizer_fits()
        fresh = self.student.fresh
        if fresh.architecture == "t5" and not fresh.tie_word_embeddings:
            raise ValueError("student.fresh.tie_word_embeddings must be true for t5: transformers always ties them")
        if fresh.hidden_size % fresh.num_heads:
            raise ValueError(
                f"student.fresh.hidden_size {fresh.hidden_size} is not a multiple of num_heads {fresh.num_heads}"
            )
        return self

    def _optimizer_fits(self) -> None:
        train = self.train
        if train.optim != "adamw" and train.deepspeed is not None:
            raise ValueError(
                f"train.optim={train.optim} needs whole matrices in one process, and DeepSpeed cuts them into parts: "
                "use train.optim=adamw, or one process without train.deepspeed"
            )
        if train.optim == "muon" and self.student.lora.rank:
            raise ValueError("train.optim=muon is for whole matrices, not for the factors of LoRA: use adamw")
        if train.fp16 and train.bf16 is not False:
            raise ValueError("train.fp16 and train.bf16 exclude each other: set one of them to false")
        if train.fp16 and train.deepspeed is not None:
            raise ValueError("train.fp16 runs in one process without train.deepspeed: use train.bf16 with DeepSpeed")

    def _lora_fits(self) -> None:
        lora = self.student.lora
        if lora.rank == 0:
            if lora != LoraConfig():
                raise ValueError("student.lora has no effect with student.lora.rank=0: set a rank, such as 16")
            return
        if self.student.model_name_or_path is None or self.student.warm_start is not None:
            raise ValueError(
                "student.lora needs a pretrained language model: set student.model_name_or_path, without warm_start"
            )
        if lora.frozen_dtype == "bfloat16" and self.train.bf16 is not True:
            raise ValueError("student.lora.frozen_dtype=bfloat16 needs train.bf16=true")
