"""The loss kernels on a GPU, against their floors and against what else could be installed: one table in one call.

    python benchmarks/loss_gpu.py [--budget-seconds 450] [--shapes C B A] [--output loss_gpu.json]
    python benchmarks/loss_gpu.py --device cpu --quick    # the same code, tiny, with the reference: no GPU figures

First each kernel is held against the reference on the device, then the device's own ceilings are measured, then come
the rows in the order of what they decide. A goal stands beside its figure, with `met` or `MISSED`. Whatever fails, or
is not installed, or comes after the budget is spent, is named in its row. Figures in ms are of the device alone (the
GPU is kept busy until all launches of a call are queued), medians with the 20th and 80th percentile; whole steps are by
the wall clock, launches included. Shapes A, B and C are batches of students of about 0.1, 1.5 and 14 billion
parameters; their hidden states are taken from a ring larger than the cache.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from contenders import MAKERS
from gpu_cases import SHAPES, Case
from gpu_parts import (
    captured_in_a_graph,
    contrastive,
    disagreements,
    graph_breaks,
    host_syncs,
    packing_changes_bits,
    whole_step,
)
from ledger import Found, Goal, Ledger, Stopwatch, peak_megabytes
from measuring import machine

from pst_dist.logs import quiet_libraries
from pst_dist.storage.manifest import write_json

LIBRARIES = ("triton", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels")
# Goals: median ms by shape.
POOL_MS = {"C": 0.113}
WRITE_MS = {"C": 0.18}
MARGINAL_MS = {"C": 0.27, "B": 0.08}
HEAD_MS = {"C": 30.0, "B": 11.0}


def ceilings(ledger: Ledger, watch: Stopwatch, *, quick: bool) -> None:
    """What the device can do at most: a copy, and a bfloat16 matrix product."""
    elements, side = (1 << 20, 256) if quick else (1 << 29, 8192)

    def copy() -> Found:
        source = torch.ones(elements, device=watch.device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        median, *_ = watch(lambda _: target.copy_(source))
        return Found(2 * source.nbytes / median / 1e6, "GB/s", note="read + written")

    def product() -> Found:
        left, right = (torch.randn(side, side, device=watch.device, dtype=torch.bfloat16) for _ in range(2))
        median, *_ = watch(lambda _: left @ right)
        return Found(2 * side**3 / median / 1e9, "TFLOP/s", note=f"{side} x {side} x {side}")

    ledger.measure("ceiling: copy", "", "torch", copy)
    ledger.measure("ceiling: bf16 GEMM", "", "torch", product)


def streaming(ledger: Ledger, watch: Stopwatch, case: Case) -> None:
    """The two kernels that carry all the bytes, as times and as shares of the measured copy."""
    shape, item = case.shape, case.dtype.itemsize
    span_bytes = shape.batch * shape.span * shape.width * item
    gradient_bytes = shape.elements * item
    for metric, run, moved, limits, share in (
        ("pool forward", case.pool(), span_bytes, POOL_MS, 0.90),
        ("hidden gradient write", case.gradient(with_spans=True), gradient_bytes, WRITE_MS, 0.85),
    ):
        limit = limits.get(shape.name)
        ledger.measure(metric, shape.name, "pst_dist", lambda run=run: watch.found(run), Goal(limit) if limit else None)

        def share_of_copy(metric: str = metric, moved: int = moved) -> Found:
            speed = moved / ledger.figure(metric, shape.name, "pst_dist") / 1e6
            return Found(speed / ledger.figure("ceiling: copy", "", "torch"), "of copy", note=f"{moved / 1e6:.0f} MB")

        # At A everything fits the cache and a launch takes longer than the bytes: no goal.
        goal = Goal(share, at_least=True) if shape.name != "A" else None
        ledger.measure(f"{metric}, bandwidth", shape.name, "pst_dist", share_of_copy, goal)
    for kind in ("naive", "bmm"):
        pool = case.eager_pool(kind)
        run = lambda index, pool=pool: pool(case.at(index).detach())  # noqa: E731
        ledger.measure("pool forward", shape.name, kind, lambda run=run: watch.found(run))


def alignment(ledger: Ledger, watch: Stopwatch, case: Case) -> None:
    """What the alignment adds to a step, in time and memory."""
    shape, metric = case.shape, "alignment, marginal"

    def ours() -> Found:
        alone, both = watch(case.gradient(with_spans=False)), watch(case.aligned())
        return Found(both[0] - alone[0], "ms", both[1] - alone[2], both[2] - alone[1], f"of {both[0]:.3f} with CE's")

    def extra() -> Found:
        # The projection's own gradient is anybody's, so it is left out.
        case.align.requires_grad_(False)
        try:
            runs = (case.gradient(with_spans=False), case.aligned())
            alone, both = (peak_megabytes(run, case.device, case.forget) for run in runs)
        finally:
            case.align.requires_grad_(True)
        return Found(100 * (both - alone) * 2**20 / (shape.elements * case.dtype.itemsize), "% of H")

    limit = MARGINAL_MS.get(shape.name)
    ledger.measure(metric, shape.name, "pst_dist", ours, Goal(limit) if limit else None)
    ledger.measure("alignment, extra peak", shape.name, "pst_dist", extra, Goal(1.0))
    for kind in ("naive", "loop", "bmm"):
        ledger.measure(metric, shape.name, kind, lambda kind=kind: watch.found(case.eager_aligned(kind)))
    ledger.gain(metric, shape.name, "naive", "pst_dist", Goal(9.0, at_least=True) if shape.name != "A" else None)


def head(ledger: Ledger, watch: Stopwatch, case: Case, others: Sequence[str], *, ours: bool) -> None:
    """The whole loss path, forward and backward, and its peak; ours and some others."""
    shape, metric = case.shape, "fused head, fwd + bwd"
    if ours:
        limit = HEAD_MS.get(shape.name)
        goal = Goal(limit) if limit else None
        ledger.measure(metric, shape.name, "pst_dist", lambda: watch.found(case.combined()), goal)

        def speed() -> Found:
            return Found(shape.head_flop / ledger.figure(metric, shape.name, "pst_dist") / 1e9, "TFLOP/s")

        goal = Goal(650, at_least=True) if shape.name == "C" else None
        ledger.measure("fused head, on compacted rows", shape.name, "pst_dist", speed, goal)
        _peak(ledger, case, "pst_dist", case.combined)
        _error(ledger, case, "pst_dist", case.combined)
    for who in others:
        figure = ledger.measure(metric, shape.name, who, lambda who=who: watch.found(case.other(who)))
        if figure is None:
            continue
        ledger.gain(metric, shape.name, who, "pst_dist")
        _peak(ledger, case, who, lambda who=who: case.other(who))
        _error(ledger, case, who, lambda who=who: case.other(who))


def _peak(ledger: Ledger, case: Case, who: str, make: Callable[[], Callable[[int], object]]) -> None:
    def peak() -> Found:
        return Found(peak_megabytes(make(), case.device, case.forget), "MiB")

    ledger.measure("fused head, peak", case.shape.name, who, peak)


def _error(ledger: Ledger, case: Case, who: str, make: Callable[[], Callable[[int], torch.Tensor]]) -> None:
    def error() -> Found:
        value = make()(0).detach()
        distance = abs(float(value) - case.exact_loss) / abs(case.exact_loss)
        return Found(distance, "relative", note=f"{value.dtype}, {float(value):.5f}")

    goal = Goal(1e-3) if who == "pst_dist" else None
    ledger.measure("loss, error to float64", case.shape.name, who, error, goal)


def compiled(ledger: Ledger, watch: Stopwatch, case: Case, backend: str) -> None:
    """torch.compile of what a user would write."""
    name, metric = case.shape.name, "alignment, marginal"
    ledger.measure(metric, name, "compile", lambda: watch.found(case.eager_aligned("naive", backend)))
    ledger.gain(metric, name, "compile", "pst_dist", Goal(2.8, at_least=True) if name != "A" else None)
    metric = "fused head, fwd + bwd"
    ledger.measure(metric, name, "compile", lambda: watch.found(case.other("trainer", backend)))
    ledger.gain(metric, name, "compile", "pst_dist")


def main() -> None:
    """Fill the table, print it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few calls: to see that it runs")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["C", "B", "A"])
    parser.add_argument("--budget-seconds", type=float, default=450)
    parser.add_argument("--output", type=Path, default=Path("loss_gpu.json"))
    parser.add_argument("--others", nargs="+", choices=list(MAKERS), default=list(MAKERS), help="contenders")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --device cpu --quick runs the same code without one")
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # the trainer's engine takes a GPU where there is one
    quiet_libraries()
    figures = device.type == "cuda" and not args.quick
    if not figures:
        print("No GPU figures: tiny shapes" + ("" if device.type == "cuda" else " and the reference on a CPU") + ".")
    ledger = Ledger(args.budget_seconds, judge=figures)
    watch = Stopwatch(device, *((0.02, 5) if args.quick else ()))
    backend = "aot_eager" if args.quick else "inductor"
    shapes = [SHAPES[name].tiny() if args.quick else SHAPES[name] for name in args.shapes]

    disagreements(ledger, device)
    ceilings(ledger, watch, quick=args.quick)
    for shape in shapes:
        case = Case(shape, device, torch.bfloat16)
        streaming(ledger, watch, case)
        alignment(ledger, watch, case)
        head(ledger, watch, case, ("compacted",), ours=True)
        host_syncs(ledger, case, [name for name in args.others if name not in ("trainer", "quack")])
        del case
    contrastive(ledger, watch, quick=args.quick)
    for check in (captured_in_a_graph, packing_changes_bits, graph_breaks):
        check(ledger, watch, Case(shapes[-1], device, torch.bfloat16))
    for size in ("0.1B",) if args.quick else ("0.1B", "1.5B"):
        for setting in ("answer_span", "rationale_token"):
            whole_step(ledger, device, size, setting, args.others, quick=args.quick)
    # From here on others' best, and what takes long to compile: the first to go when the budget is small.
    for part in (("liger", "trl", "torch_chunked", "cce", "trainer"), ("compile",), ("quack",)):
        others = tuple(name for name in part if name in (*args.others, "compile"))
        for shape in shapes:
            case = Case(shape, device, torch.bfloat16)
            if others == ("compile",):
                compiled(ledger, watch, case, backend)
            else:
                head(ledger, watch, case, others, ours=False)
            del case

    verdicts = [row.verdict for row in ledger.rows]
    print(f"goals: {verdicts.count('met')} met, {verdicts.count('MISSED')} missed, {verdicts.count('no figure')} open")
    report = {"machine": machine(device, LIBRARIES), "quick": args.quick, "gpu_figures": figures}
    write_json(args.output, report | {"rows": ledger.to_json()})


if __name__ == "__main__":
    main()
