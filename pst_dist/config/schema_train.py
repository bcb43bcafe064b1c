"""The settings of the training: optimisation, steps, checkpoints, trackers, ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pst_dist.config.section import Fraction, Plain, Positive, Section, Weight


class RayTrainConfig(Section):
    """Workers of Ray Train; each worker is one rank."""

    address: Plain | None = None
    """Ray cluster to connect to, as in embed.ray.address. Default: RAY_ADDRESS; otherwise a local cluster."""
    num_workers: Positive = 1
    """Number of ranks. More than one requires train.deepspeed."""
    min_workers: Positive | None = None
    """Minimum number of ranks. When the cluster shrinks, training continues with as few ranks as this, and grows back
    to num_workers when there is room. A checkpoint can be resumed with any number of ranks."""
    resize_seconds: Annotated[float, Field(gt=0)] = 60
    """With min_workers: how often Ray checks whether there is room for more ranks. Growing restarts all ranks from the
    newest checkpoint, which costs the steps since then."""
    num_cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPU cores per rank."""
    num_gpus_per_worker: Annotated[int, Field(ge=0, le=1)] | None = None
    """1 gives each rank a GPU and communicates through NCCL; 0 uses CPUs and gloo. Default: 1 on a cluster that has
    GPUs, else 0."""
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places ranks: on few nodes (PACK) or across many (SPREAD). The STRICT_ variants wait until it is
    possible."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often Ray restarts all ranks after one is lost. They resume from the newest valid checkpoint."""
    wait_seconds: Annotated[int, Field(ge=0)] = 0
    """How long to wait for free resources on an autoscaling cluster. 0 does not wait: a run that does not fit is
    refused at once."""


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

    optim: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    """Optimizer of the hidden matrices; all other parameters always use AdamW. `muon` orthogonalises each update (torch
    2.9 or newer) and keeps one moment instead of two; its updates are as large as AdamW's, so learning rates stay
    comparable. `adamw_8bit` stores each of the two moments in one byte (bitsandbytes). Neither runs with DeepSpeed."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate. The default follows the kind of student: 1e-3 for random weights, 1e-4 for all weights of a
    pretrained model, 5e-4 for LoRA and for an encoder turned into a student (warm_start). These suit models of about
    100 million parameters; larger ones usually need less."""
    head_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the alignment head, which starts from random weights unless loss.head_init is ridge. It
    follows the same schedule. Default: learning_rate."""
    embedding_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the input and output embeddings; with LoRA, of the added tokens' embeddings, because only
    these are trained. It follows the same schedule. Default: learning_rate."""
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
    gradient_accumulation_steps times the number of ranks, so it grows with the number of ranks."""
    per_device_train_batch_size: Positive = 32
    """Maximum samples per forward pass on one rank. Affects memory, not the gradient."""
    micro_batch_tokens: Positive | Literal["auto"] | None = "auto"
    """Maximum tokens per forward pass on one rank, padding included. The rows of a step are sorted by length and cut
    into passes so that padding is smallest; a row that exceeds the limit gets its own pass. `auto`: on GPUs, the
    number of tokens that fit in 80 % of the memory of the rank with the least memory, estimated as in `pst plan` (not
    run on a GPU); on CPUs, only the number of samples is limited. null keeps the rows in the order in which they were
    drawn. A single process also halves a pass that runs out of memory. Affects memory and time, not the gradient. One
    process on a CPU makes extra passes when that saves padding; on GPUs and with DeepSpeed there are only as many
    passes as the limits require, so set a lower limit there to reduce padding."""
    padding_free: bool = False
    """Concatenate the rows of a forward pass instead of padding them; position ids keep the rows apart. This saves time
    with student.attn_implementation=flash_attention_2 (not run here: it needs a GPU). Other implementations compute the
    same, but attention over all rows of the pass. Only for causal models that support it, which is tested before the
    first step. Affects memory and time, not the gradient."""
    gradient_accumulation_steps: Positive | None = None
    """Forward passes per optimizer step. Set it only with global_batch_size=null; otherwise it is computed from the two
    sizes above."""
    num_train_epochs: Positive = 10
    """Passes over the training rows. Ignored when max_steps is given."""
    max_steps: Positive | None = None
    """Number of optimizer steps. Overrides num_train_epochs."""
    early_stopping_patience: Positive | None = None
    """Stop after this many validations in a row without an improvement of `metric_for_best_model`. The best student is
    kept in any case. The learning-rate schedule still spans all steps. Default: train all steps."""
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
    """Compute in bfloat16 with float32 master weights. `auto` chooses once, when a run starts, and records the choice:
    on a GPU by its capability; on a CPU by timing passes of the student in both precisions, because bfloat16 is faster
    on some processors and slower on others, depending also on the size of the student."""
    fp16: bool = False
    """Compute in float16 with float32 master weights and a dynamic loss scale, on GPUs without bfloat16 (V100, T4, RTX
    20). A step whose gradients overflow is computed again with half the scale. One process only; not on a CPU."""
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
    Without this, any changed setting is refused."""
    metric_for_best_model: Literal["answer_nll", "accuracy"] = "answer_nll"
    """How the best checkpoint is chosen, on validation rows only. `answer_nll` is the negative log-likelihood of the
    text up to the end of the answer (which includes the rationale in arms that think first); `accuracy` decodes the
    rows."""
    report_to: Annotated[list[str], BeforeValidator(_tracker_list), AfterValidator(_known_trackers)] = ["tensorboard"]
    """Where to write metrics in addition to metrics.jsonl: any of tensorboard, wandb, mlflow and trackio, or a tracker
    from another package (entry points in the group pst_dist.trackers). `none` writes metrics.jsonl only."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Serve the same metrics to Prometheus at http://127.0.0.1:PORT/metrics while training (extra `prometheus`). On
    Ray, Ray's own exporter always has them."""
    sample_answers: Annotated[int, Field(ge=0, le=64)] = 3
    """Number of validation questions to answer at each validation, for the trackers and `pst watch`."""
    dataloader_num_workers: Annotated[int, Field(ge=0)] = 0
    """Number of processes that read and tokenise batches in advance. 0 does this in the training process: a thread
    prepares the next step's batch while the current step computes."""
    num_threads: Positive | None = None
    """torch threads per rank on CPU. Default: torch's own default."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600
    """With several ranks: when no rank has made progress for this long, stop the run and name the rank that hangs. Must
    exceed the longest operation that reports no progress: loading the model, a forward and backward pass, writing one
    checkpoint file."""
    backend: Literal["local", "ray"] = "local"
    """`local` uses the ranks that the launcher started (one without a launcher), `ray` uses Ray Train workers. Training
    is the same."""
    ray: RayTrainConfig = RayTrainConfig()
    """Settings of the Ray backend."""
