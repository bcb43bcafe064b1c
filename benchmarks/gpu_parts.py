"""Rows of the GPU benchmark that are checks, InfoNCE, or whole training steps; `loss_gpu` has the kernels' times."""

# Shapes in this file: A rows, G keys, E teacher width

from __future__ import annotations

import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from contenders import NotHere, cross_entropies
from gpu_cases import Case
from ledger import Found, Goal, Ledger, Stopwatch, peak_megabytes
from step_cases import FLOOR, OURS, SETTINGS, TEACHER_WIDTH, Problem, make_problem, make_student, step_losses
from torch import Tensor

from pst_dist.config.schema import TrainConfig
from pst_dist.distributed.ranks import Ranks
from pst_dist.kernels import reference
from pst_dist.kernels.contrastive import info_nce
from pst_dist.kernels.dispatch import backend_for
from pst_dist.kernels.head import combined_head
from pst_dist.kernels.ops import row_distance, span_mean
from pst_dist.kernels.spans import Spans
from pst_dist.training.engines.single_engine import SingleProcessEngine
from pst_dist.training.module import Student

NONE = Goal(0)


def disagreements(ledger: Ledger, device: torch.device) -> None:
    """Which kernels run, and the start-up self-tests of the Triton ones and of fused InfoNCE: 0 when they agree."""

    def kernels() -> Found:
        _cuda(device)
        from pst_dist.kernels import triton_backend
        from pst_dist.kernels.self_test import disagreement

        return _agreed(disagreement(triton_backend, reference, device))

    def fused() -> Found:
        _cuda(device)
        from pst_dist.kernels.contrastive_kernels import disagreement

        return _agreed(disagreement(device))

    in_use = backend_for(device).name
    ledger.measure("kernels in use", "", "pst_dist", lambda: Found(float(in_use == "triton"), "", note=in_use))
    ledger.measure("kernels that disagree", "", "pst_dist", kernels, NONE)
    ledger.measure("fused InfoNCE disagrees", "", "pst_dist", fused, NONE)


def _agreed(obstacle: str | None) -> Found:
    return Found(float(obstacle is not None), "", note=obstacle or "")


def _cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise NotHere(f"needs CUDA, this is {device.type}")


def host_syncs(ledger: Ledger, case: Case, others: list[str]) -> None:
    """How often the host waits for the device in one forward and backward pass, as torch's own warnings count it."""

    def count(make: Callable[[], Callable[[int], object]]) -> Found:
        _cuda(case.device)
        run = make()
        run(0)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(1)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return Found(float(sum("synchroniz" in str(item.message) for item in caught)), "syncs")

    name = case.shape.name
    ledger.measure("host syncs of the loss path", name, "pst_dist", lambda: count(case.combined), NONE)
    for who in others:
        ledger.measure("host syncs of the loss path", name, who, lambda who=who: count(lambda: case.other(who)))


def captured_in_a_graph(ledger: Ledger, watch: Stopwatch, case: Case) -> None:
    """Pooling and alignment, forward and backward, as one CUDA graph, and how far its gradients are from eager ones."""
    hidden = case.hidden[0]

    def gradients() -> tuple[Tensor, ...]:
        pooled = span_mean(hidden, case.spans)
        distance, _ = row_distance(case.align(pooled.to(case.dtype)), case.teacher, kind="cosine")
        return torch.autograd.grad(distance.mean(), [hidden, case.align.weight])

    def replay() -> Found:
        eager = [gradient.clone() for gradient in gradients()]
        _cuda(case.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                gradients()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients()
        for gradient in captured:
            gradient.zero_()
        graph.replay()
        torch.cuda.synchronize()
        # Not the same bits: cuBLAS may split the projection's product in another way within a graph.
        gap = max(float((a - b).norm() / a.norm()) for a, b in zip(eager, captured, strict=True))
        return watch.found(lambda _: graph.replay(), f"relative difference to eager {gap:.1e}")

    shape = case.shape.name
    ledger.measure("pool + alignment, CUDA graph", shape, "pst_dist", replay)
    ledger.measure("pool + alignment, eager", shape, "pst_dist", lambda: watch.found(lambda _: gradients()))


def packing_changes_bits(ledger: Ledger, watch: Stopwatch, case: Case) -> None:
    """Spans whose mean changes by a bit when rows change places, or all stand in one long row; none should."""
    shape, hidden = case.shape, case.hidden[0].detach()

    def changed() -> Found:
        order = torch.randperm(shape.batch, generator=torch.Generator().manual_seed(1)).to(case.device)
        ends = [(row + 1) * shape.length for row in range(shape.batch)]
        places = [(0, end - shape.span, shape.span) for end in ends]
        packed = Spans.of(places, batch=1, length=shape.batch * shape.length).to(case.device)
        means = span_mean(hidden, case.spans)
        moved = span_mean(hidden[order], case.spans) != means[order]
        joined = span_mean(hidden.view(1, -1, shape.width), packed) != means
        return Found(float(moved.any(-1).sum() + joined.any(-1).sum()), "spans", note=f"of {2 * shape.batch}")

    ledger.measure("spans that packing changes", shape.name, "pst_dist", changed, NONE)


def graph_breaks(ledger: Ledger, watch: Stopwatch, case: Case) -> None:
    """Breaks that torch.compile makes in the loss path."""

    def path(hidden: Tensor) -> Tensor:
        output = combined_head(hidden, case.head, case.supervised, case.weights, case.spans)
        distance, _ = row_distance(case.align(output.pooled.to(case.dtype)), case.teacher, kind="cosine")
        return output.loss + distance.mean()

    def breaks() -> Found:
        explained = torch._dynamo.explain(path)(case.hidden[0])
        reasons = [str(reason.reason) for reason in explained.break_reasons]
        return Found(float(explained.graph_break_count), "breaks", note="; ".join(reasons)[:160])

    ledger.measure("graph breaks of the loss path", case.shape.name, "pst_dist", breaks, NONE)


def contrastive(ledger: Ledger, watch: Stopwatch, *, quick: bool) -> None:
    """InfoNCE with frozen keys, losses and the queries' gradient: a large batch, and a small one against a bank."""
    device = watch.device
    large, small = ((96, 256, 32), (4, 256, 32)) if quick else ((8192, 65536, 1024), (64, 65536, 1024))
    for (rows, keys, width), milliseconds in ((large, 4.2), (small, 0.10)):
        title = f"InfoNCE {rows} x {keys} x {width}"
        queries = F.normalize(torch.randn(rows, width, device=device), dim=-1).bfloat16().requires_grad_()
        bank = F.normalize(torch.randn(keys, width, device=device), dim=-1).bfloat16()
        own, groups = torch.arange(rows, device=device), torch.arange(keys, device=device)

        def ours(_: int, q: Tensor = queries, k: Tensor = bank, i: Tensor = own, g: Tensor = groups) -> object:
            # Every question is its own group here, and row i's question is key i's.
            return torch.autograd.grad(info_nce(q, k, i, i, g, temperature=0.05).mean(), q)

        def eager(_: int, q: Tensor = queries, k: Tensor = bank, i: Tensor = own) -> object:
            return torch.autograd.grad(F.cross_entropy((q @ k.T).float() / 0.05, i), q)

        runs: dict[str, Callable[[int], object]] = {"pst_dist": ours, "eager": eager}
        for who, run in runs.items():
            goal = Goal(milliseconds) if who == "pst_dist" else None
            ledger.measure(title, "", who, lambda run=run: watch.found(run), goal)

            def speed(title: str = title, who: str = who, flop: float = 4.0 * rows * keys * width) -> Found:
                return Found(flop / ledger.figure(title, "", who) / 1e9, "TFLOP/s")

            goal = Goal(520, at_least=True) if who == "pst_dist" and rows == 8192 else None
            ledger.measure(f"{title}, speed", "", who, speed, goal)
            goal = Goal(64.0) if who == "pst_dist" and rows == 8192 else None
            ledger.measure(f"{title}, peak", "", who, lambda run=run: Found(peak_megabytes(run, device), "MiB"), goal)
        ledger.measure(title, "", "inf_cl", lambda q=queries, k=bank: watch.found(_inf_cl(q, k)))


def _inf_cl(queries_AE: Tensor, keys_GE: Tensor) -> Callable[[int], object]:
    """Inf-CL's flash InfoNCE of one process, where it is installed; it knows square batches only."""
    try:
        function: Any = importlib.import_module("inf_cl").cal_flash_loss
    except ImportError as error:
        raise NotHere(f"ImportError: {error}") from error
    scale = torch.tensor(20.0, device=queries_AE.device)
    return lambda _: torch.autograd.grad(function(queries_AE, keys_GE[: len(queries_AE)], scale=scale), queries_AE)


def whole_step(
    ledger: Ledger, device: torch.device, size: str, setting: str, others: list[str], *, quick: bool
) -> None:
    """Steps of a student under bfloat16 autocast, by the trainer's engine: ours and what else runs here."""
    metric, vocabulary = f"step {size}, {setting}", 50257 if size == "0.1B" else 151936
    rows, rounds = (4, 2) if quick else ((128 if size == "0.1B" else 64), 5)
    vocabulary = 500 if quick else vocabulary
    others, _ = cross_entropies(device, [name for name in others if name in ("trainer", "compacted", "liger", "trl")])
    made: list[tuple[dict[str, Callable[[], Tensor]], SingleProcessEngine]] = []

    def prepare() -> Found:
        problem = _moved(make_problem(SETTINGS[setting], rows=rows, vocabulary=vocabulary), device)
        student = _student(size, setting, vocabulary, device, quick=quick).train()
        losses = step_losses(student, problem, [*others, FLOOR])
        made.append((losses, SingleProcessEngine(student, TrainConfig(bf16=True), Ranks())))
        return Found(problem.batch.input_ids.numel(), "tokens", note=f"{problem.tokens} supervised")

    if ledger.measure(f"{metric}, batch", "", "", prepare) is None:
        return
    losses, engine = made.pop()
    for name in [OURS, *others, FLOOR]:
        ledger.measure(metric, "", name, lambda name=name: _steps(engine, losses[name], device, rounds))
        if name != OURS:
            ledger.gain(metric, "", name, OURS)


def _steps(engine: SingleProcessEngine, loss: Callable[[], Tensor], device: torch.device, rounds: int) -> Found:
    """Wall-clock ms of forward, backward, clip and update; the loss and the peak memory in the note."""
    times, value = [], 0.0
    for number in range(rounds + 2):
        if number == 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        begin = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = loss()
        value = float(output.detach()) if number == 0 else value
        engine.backward(output, last=True)
        engine.step(0.0)  # the next contender is to see the same weights
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - begin))
        del output
    times = sorted(times[2:])
    peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
    return Found(statistics.median(times), "ms", times[0], times[-1], f"loss {value:.4f}{peak}")


def _student(size: str, setting: str, vocabulary: int, device: torch.device, *, quick: bool) -> Student:
    if quick or size == "0.1B":
        layers, width = (1, 64) if quick else (12, 768)
        return make_student(SETTINGS[setting], vocabulary=vocabulary, layers=layers, width=width).to(device)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with device:  # so many random numbers take minutes on a CPU
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=1536,
                intermediate_size=8960,
                num_hidden_layers=28,
                num_attention_heads=12,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    return Student(model, SETTINGS[setting].config.loss, TEACHER_WIDTH).to(device)


def _moved(problem: Problem, device: torch.device) -> Problem:
    return replace(
        problem,
        batch=problem.batch.to(device),
        scales=problem.scales.to(device),
        labels=problem.labels.to(device),
        mask=problem.mask.to(device),
    )
