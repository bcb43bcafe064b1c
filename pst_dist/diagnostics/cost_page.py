"""The plan of a run as text; `diagnostics.cost` computes it."""

from __future__ import annotations

from collections.abc import Sequence

from pst_dist.config.schema import TrainConfig
from pst_dist.config.zero import zero_stage
from pst_dist.diagnostics.cost import Plan
from pst_dist.distributed.device_memory import GIB
from pst_dist.training.memory.pass_limit import SHARE, PassLimit


def plan_lines(plan: Plan) -> list[str]:
    """The plan as lines of text."""
    train, machines, rows = plan.config.train, plan.machines, plan.rows
    about = "" if rows.exact else " (estimated at four characters per token)"
    of_them = f" ({plan.trained:,} of them trained)" if plan.trained != plan.parameters else ""
    count = f"{plan.parameters:,}{of_them}" + ("" if plan.shape.exact else " (estimated as a Llama of this shape)")
    engine = train.deepspeed or "one process"
    lines = [
        f"{plan.config.arm}: {count} parameters on {machines.nodes} x {machines.gpus} ranks, {engine}, "
        f"{_precision(train)}, {train.optim}",
        "",
        f"rows         {rows.rows:,}, {rows.tokens / max(1, rows.rows):.0f} tokens each{about}",
        f"steps        {plan.steps:,} of {plan.global_batch} rows, {plan.micro_batches} forward pass(es) per rank",
        f"time         {_hours(plan.training_hours, 'tokens_per_second')}{_source(plan)}",
        f"embeddings   {rows.texts:,} texts, {_bytes(plan.embedding_bytes)}; "
        f"{_hours(plan.embedding_hours, 'texts_per_second')}",
        f"checkpoint   {_bytes(plan.checkpoint_bytes)}, {plan.checkpoint_seconds:.3g} s at "
        f"{machines.write_gb_per_second:g} GB/s; {train.save_total_limit + 1} of them, including the best one, take "
        f"{_bytes((train.save_total_limit + 1) * plan.checkpoint_bytes)}",
        f"failures     {'unknown, as the time is' if plan.failures is None else f'{plan.failures:.2g} expected'}; "
        f"{_saves(plan)}",
        "",
        f"memory per rank  {'weights':>10} {'gradients':>10} {'optimizer':>10} {'buckets':>10} "
        f"{'activations':>12} {'loss path':>10} {'total':>10}",
    ]
    chosen = zero_stage(train.deepspeed)
    for stage, memory in plan.by_stage.items():
        if chosen is None and stage == 0:
            memory = plan.memory  # one process collects no gradients in buckets
        parts = (
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.buffers,
            memory.activations,
            memory.loss_path,
        )
        cells = " ".join(
            f"{_bytes(part):>{width}}" for part, width in zip(parts, (10, 10, 10, 10, 12, 10), strict=True)
        )
        mark = "  <- this run" if stage == chosen or (chosen is None and stage == 0) else ""
        lines.append(f"  ZeRO stage {stage}   {cells} {_bytes(memory.total):>10}{mark}")
    host = plan.host
    lines.append(
        f"host memory  {_bytes(host.program)} for the program, {_bytes(host.loading)} more while loading, "
        f"{_bytes(host.copied + host.student)} while saving"
        + (f", {_bytes(host.offloaded)} offloaded" if host.offloaded else "")
        + f"; on CPUs the process of rank 0 needs {_bytes(host.on_cpu(plan.memory))} in all"
    )
    if plan.pass_limit is not None:
        lines.append(f"pass limit   train.micro_batch_tokens=auto would set {_limit(plan, plan.pass_limit)}")
    if machines.gpu_memory is not None:
        verdict = "fits" if plan.memory.total < 0.9 * machines.gpu_memory * GIB else "does not fit"
        lines.append(f"  one rank {verdict} in {machines.gpu_memory:g} GiB, with a tenth reserved for the allocator")
    return lines


def arm_lines(plans: Sequence[Plan]) -> list[str]:
    """What the other arms of a run cost, which are trained one after the other; empty for one arm."""
    if len(plans) < 2:
        return []
    lines = ["", f"the run trains {len(plans)} arms one after the other; above is {plans[0].config.arm}, and"]
    width = max(len(plan.config.arm) for plan in plans)
    for plan in plans[1:]:
        each = plan.rows.tokens / max(1, plan.rows.rows)
        time = "" if plan.training_hours is None else f", {_hours(plan.training_hours, '')}"
        lines.append(f"  {plan.config.arm:<{width}}  {each:.0f} tokens a row, {_bytes(plan.memory.total)} a rank{time}")
    hours = [plan.training_hours for plan in plans if plan.training_hours is not None]
    if len(hours) == len(plans):
        lines.append(f"  {'together':<{width}}  {_hours(sum(hours), '')}")
    return lines


def _limit(plan: Plan, limit: PassLimit) -> str:
    """The limit that a GPU of this memory would get; it depends on what is free there."""
    why = f"{SHARE:.0%} of {plan.machines.gpu_memory:g} GiB, less {_bytes(limit.fixed)}"
    if limit.fixed > SHARE * limit.memory:
        return f"one row a pass: {why} for weights, gradients and optimizer leaves nothing"
    rows = plan.config.train.per_device_train_batch_size
    most = plan.config.layout.max_length * (2 if plan.shape.encoder_layers else 1)
    if limit.tokens >= rows * most:
        return f"none: {rows} rows of {most} tokens fit ({why}; not tried on a GPU)"
    return f"at most {limit.tokens:,} tokens a pass ({why}; not tried on a GPU)"


def _source(plan: Plan) -> str:
    """Where the speed comes from, if it is the table's."""
    if plan.machines.gpu is None or plan.machines.tokens_per_second is None:
        return ""
    speed = f"{plan.machines.tokens_per_second:,.0f} tok/s a rank"
    return f" at least, a guess: {speed} is 30 % of the peak of {plan.machines.gpu}, which small students do not reach"


def _precision(train: TrainConfig) -> str:
    if train.fp16:
        return "fp16"
    return {True: "bf16", False: "float32", "auto": "float32 or bf16 (counted as float32)"}[train.bf16]


def _saves(plan: Plan) -> str:
    """How often to save (Young 1974; Daly 2006), within the length of the training."""
    if plan.save_every_steps is not None and plan.save_every_steps >= plan.steps:
        return "the training is shorter than the best time between two saves, so its last save is enough"
    rule = "(Young 1974; Daly 2006: sqrt(2 x save time x time between failures))"
    steps = f" = train.save_steps={plan.save_every_steps}" if plan.save_every_steps else ""
    shorter = "" if plan.save_every_steps else ", or once at the end of a shorter training"
    return f"to lose the least work, save every {plan.save_every_seconds / 60:.3g} min{steps}{shorter} {rule}"


def _hours(hours: float | None, word: str) -> str:
    if hours is None:
        return f"unknown: add --measure, or set {word}=…"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def _bytes(count: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", GIB), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1024:.3g} KiB"
