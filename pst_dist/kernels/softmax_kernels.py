"""A Triton kernel that turns rows of logits into negative log likelihoods and, in place, into their gradient.

It is used for the vocabulary (`softmax_nll`) and the keys of InfoNCE (`contrastive_nll`, which adds a mask). A row is
read twice, the second time mostly from the cache, and written once; probabilities are never stored separately.
"""

# Shapes in this file: C rows of a chunk, V classes (vocabulary or keys; `classes`). Tensors are pointers here.

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The smallest finite float32, the start of a running maximum: minus infinity minus itself would be NaN."""
BODY_GRAIN = tl.constexpr(16)
"""The body of a row begins and ends at multiples of this many elements, so that its loads and stores are 128-bit."""


@triton.jit
def softmax_rows(
    logits_CV,
    targets_C,
    weights_C,
    nll_C,
    groups_C,
    class_groups_V,
    classes,
    stride,
    HAS_WEIGHTS: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    PEEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Negative log likelihood of each row's target; HAS_WEIGHTS: logits become the gradient of sum(weights * nll).

    Grid: rows. HAS_GROUPS excludes the classes of the row's own group, except its target. Without weights only the
    likelihoods are written. A row is a body of whole grains followed by up to 15 classes. PEEL: `stride` is not a
    multiple of BODY_GRAIN (a vocabulary of 50257), so up to 15 classes also precede the body; the last bits of a row
    then depend on its position in the chunk.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = row * stride
    target = tl.load(targets_C + row).to(tl.int32)
    # Read before any store: the reductions below end in a barrier, and the stores come after it.
    target_logit = tl.load(logits_CV + begin + target).to(tl.float32)
    group = target
    if HAS_GROUPS:
        group = tl.load(groups_C + row)
    head = 0
    if PEEL:
        head = tl.minimum((-begin) & (BODY_GRAIN - 1), classes).to(tl.int32)
    size = (classes - head) // BODY_GRAIN * BODY_GRAIN
    body = logits_CV + tl.multiple_of(begin + head, BODY_GRAIN)

    lanes = tl.arange(0, 2 * BODY_GRAIN)
    edges = tl.where(lanes < BODY_GRAIN, lanes, lanes - BODY_GRAIN + head + size)
    at_edge = tl.where(lanes < BODY_GRAIN, lanes < head, edges < classes)
    edge = tl.load(logits_CV + begin + edges, mask=at_edge, other=float("-inf")).to(tl.float32)
    if HAS_GROUPS:
        edge = _without_group(edge, class_groups_V, edges, at_edge, group, target)

    # Each lane keeps its own maximum and sum, so that the loop needs no reduction across lanes.
    highest = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for offset in range(0, size, BLOCK):
        places = offset + tl.arange(0, BLOCK)
        x = tl.load(body + places, mask=places < size, other=float("-inf")).to(tl.float32)
        if HAS_GROUPS:
            x = _without_group(x, class_groups_V, head + places, places < size, group, target)
        # One of the two exponentials of a running sum is always exp(0).
        decay = tl.exp(-tl.abs(x - highest))
        total = tl.where(x > highest, total * decay + 1.0, total + decay)
        highest = tl.where(x > highest, x, highest)
    peak = tl.maximum(tl.max(highest, 0), tl.maximum(tl.max(edge, 0), LOWEST))
    # Lanes at the peak are not rescaled: if it is infinite, the difference would be NaN.
    mass = tl.sum(tl.where(highest == peak, total, total * tl.exp(highest - peak)), 0)
    mass += tl.sum(tl.where(edge == peak, 1.0, tl.exp(edge - peak)), 0)
    normaliser = peak + tl.log(mass)
    tl.store(nll_C + row, normaliser - target_logit)

    if HAS_WEIGHTS:
        weight = tl.load(weights_C + row).to(tl.float32)
        dtype = logits_CV.dtype.element_ty
        tl.store(logits_CV + begin + edges, _gradient(edge, normaliser, edges == target, weight, dtype), mask=at_edge)
        for offset in range(0, size, BLOCK):
            places = offset + tl.arange(0, BLOCK)
            x = tl.load(body + places, mask=places < size, other=float("-inf")).to(tl.float32)
            if HAS_GROUPS:
                x = _without_group(x, class_groups_V, head + places, places < size, group, target)
            gradient = _gradient(x, normaliser, head + places == target, weight, dtype)
            tl.store(body + places, gradient, mask=places < size)


@triton.jit
def _gradient(x, normaliser, is_target, weight, dtype: tl.constexpr):
    """weight * (softmax - one at the target), in a given dtype."""
    return ((tl.exp(x - normaliser) - tl.where(is_target, 1.0, 0.0)) * weight).to(dtype)


@triton.jit
def _without_group(x, class_groups_V, classes, inside, group, target):
    """Logits with minus infinity for classes of a group, except the target."""
    class_group = tl.load(class_groups_V + classes, mask=inside, other=0)
    return tl.where((class_group == group) & (classes != target), float("-inf"), x)
