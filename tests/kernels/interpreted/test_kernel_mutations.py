"""The start-up self-test passes for the kernels as they are, and for none of the ways here to break one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from exactness import DTYPES

from pst_dist.kernels import reference, triton_backend
from pst_dist.kernels.self_test import disagreement

CPU = torch.device("cpu")

# (module, what stands there, what it becomes, the function that must be named)
MUTATIONS = {
    "reads past the span": ("span_kernels", "(steps < last)[", "(steps < CHUNK)[", "span_mean"),
    "every chunk begins at the span": ("span_kernels", ".to(tl.int64) + first\n", ".to(tl.int64)\n", "span_mean"),
    "the last chunk is lost": ("span_kernels", "used = tl.cdiv(length, CHUNK)", "used = length // CHUNK", "span_mean"),
    "a sum instead of a mean": (
        "span_kernels",
        "tl.div_rn(tl.sum(total, 0), tl.maximum(length, 1).to(tl.float32))\n    tl.store(means_AD",
        "tl.sum(total, 0)\n    tl.store(means_AD",
        "span_mean",
    ),
    "the sequence of a span is lost": (
        "span_kernels",
        "tl.load(rows_A + span).to(tl.int64) * batch_stride",
        "0",
        "span_mean",
    ),
    "the share is not divided": ("span_kernels", " * share[:, None]", "", "hidden_gradient"),
    "the upstream gradient is lost": ("span_kernels", " * scale[:, None]", "", "hidden_gradient"),
    "the first slot is lost": ("span_kernels", "carries = slot >= 0", "carries = slot > 0", "hidden_gradient"),
    "the first span is lost": ("span_kernels", "pooled = span >= 0", "pooled = span > 0", "hidden_gradient"),
    "the base is lost": (
        "span_kernels",
        "total = base.to(gradient_RD.dtype.element_ty).to(tl.float32)",
        "total += 0",
        "hidden_gradient",
    ),
    "the wrong position of the base": (
        "span_kernels",
        "(row % positions) * base_position_stride",
        "row * base_position_stride",
        "hidden_gradient",
    ),
    "no least norm": (
        "row_kernels",
        "tl.where(norm > eps, tl.div_rn(1.0, norm), longest_inverse)",
        "tl.div_rn(1.0, norm)",
        "row_distance",
    ),
    "no linear part": ("row_kernels", "tl.where(gap < 1.0,", "tl.where(gap < 9.0,", "row_distance"),
    "a teacher of any length": (
        "row_kernels",
        "cosine = tl.sum(product, 0) * inverse_student * inverse_teacher",
        "cosine = tl.sum(product, 0) * inverse_student",
        "row_distance",
    ),
    "short rows are pulled along themselves": (
        "row_kernels",
        "along = tl.where(inverse_student < longest_inverse, along, 0.0)",
        "along += 0.0",
        "row_distance_gradient",
    ),
    "the wrong way along": ("row_kernels", "along = -tl.load(", "along = tl.load(", "row_distance_gradient"),
    "the upstream gradient of a row is lost": (
        "row_kernels",
        "tl.load(upstream_A + row * upstream_stride).to(tl.float32) * inverse_student",
        "inverse_student",
        "row_distance_gradient",
    ),
    "an unclamped pull": (
        "row_kernels",
        "pull = tl.minimum(tl.maximum(y - z, -1.0), 1.0)",
        "pull = y - z",
        "row_distance_gradient",
    ),
    "the weight is lost": (
        "softmax_kernels",
        "tl.where(is_target, 1.0, 0.0)) * weight)",
        "tl.where(is_target, 1.0, 0.0)))",
        "softmax_nll",
    ),
    "the target is lost": ("softmax_kernels", " - tl.where(is_target, 1.0, 0.0)", "", "softmax_nll"),
    "the head is forgotten": (
        "softmax_kernels",
        "head + places == target, weight",
        "places == target, weight",
        "softmax_nll",
    ),
    "the head is twice in the body": (
        "softmax_kernels",
        "begin + head, BODY_GRAIN)",
        "begin, BODY_GRAIN)",
        "softmax_nll",
    ),
    "the end of a row is lost": (
        "softmax_kernels",
        "lanes < head, edges < classes)",
        "lanes < head, lanes < 0)",
        "softmax_nll",
    ),
    "edges are not written": ("softmax_kernels", "dtype), mask=at_edge)", "dtype), mask=lanes < 0)", "softmax_nll"),
    "a running sum that does not decay": ("softmax_kernels", "total * decay + 1.0", "total + 1.0", "softmax_nll"),
    "lanes are added as they are": ("softmax_kernels", "total * tl.exp(highest - peak)", "total", "softmax_nll"),
    "the own key is left out": ("softmax_kernels", " & (classes != target)", "", "contrastive_nll"),
    "paraphrases are negatives": (
        "softmax_kernels",
        "(class_group == group)",
        "(class_group != class_group)",
        "contrastive_nll",
    ),
}


def test_the_kernels_pass_the_self_test_in_every_dtype() -> None:
    assert disagreement(triton_backend, reference, CPU, DTYPES) is None


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_self_test_names_the_function_of_a_broken_kernel(mutation, tmp_path, monkeypatch) -> None:
    module, before, after, function = MUTATIONS[mutation]
    source = Path(triton_backend.__file__).with_name(f"{module}.py").read_text()
    assert source.count(before) == 1, "the kernel has changed: mutate what it says now"
    path = tmp_path / f"mutated_{module}.py"
    path.write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    for name in (
        "chunk_sums",
        "span_means",
        "hidden_gradient_rows",
        "row_distances",
        "row_distance_gradients",
        "softmax_rows",
    ):
        if hasattr(broken, name):
            monkeypatch.setattr(triton_backend, name, getattr(broken, name))
    sentence = disagreement(triton_backend, reference, CPU, (torch.float32,))
    assert sentence is not None and sentence.startswith(f"triton's {function} in float32 has a relative error"), (
        sentence
    )
