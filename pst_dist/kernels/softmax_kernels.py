"""A Triton kernel that turns rows of logits into negative log likelihoods and, in place, into their gradient.

It serves the vocabulary (`softmax_nll`) and the keys of InfoNCE (`contrastive_nll`, which adds a mask). A row is read
twice, the second time mostly from the cache, and written once; no row of probabilities exists beside the logits.
"""

# Shapes in this file: C rows of a chunk, V classes (vocabulary or keys; `classes`). Tensors are pointers here.

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The smallest finite float32: where a running maximum starts, as minus infinity less itself is not a number."""
GRAIN = tl.constexpr(16)
"""Elements at whose multiples blocks begin; so that loads and stores of a block are 128 bits wide."""


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

    Grid: rows. HAS_GROUPS leaves out the classes of the row's own group, its target excepted. Without weights nothing
    but the likelihoods is written. PEEL: `stride` is no multiple of GRAIN (a vocabulary of 50257), so the first block
    begins before the row, where the last multiple is; what is not of the row is masked.
    """
    row = tl.program_id(0).to(tl.int64)
    begin = row * stride
    target = tl.load(targets_C + row).to(tl.int32)
    # Read before any block is written: the reductions below end in a barrier, and the stores come after it.
    target_logit = tl.load(logits_CV + begin + target).to(tl.float32)
    group = target
    if HAS_GROUPS:
        group = tl.load(groups_C + row)
    skipped = 0
    if PEEL:
        skipped = (begin % GRAIN).to(tl.int32)
        begin = tl.multiple_of(begin - skipped, GRAIN)
    end = skipped + classes

    # Each lane keeps a maximum and a sum of its own, so that the loop reduces nothing across lanes.
    highest = tl.full([BLOCK], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for offset in range(0, end, BLOCK):
        x = _scores(logits_CV + begin, class_groups_V, offset, skipped, end, target, group, HAS_GROUPS, BLOCK)
        # Of the two exponentials of a running sum one is always exp(0).
        decay = tl.exp(-tl.abs(x - highest))
        total = tl.where(x > highest, total * decay + 1.0, total + decay)
        highest = tl.where(x > highest, x, highest)
    peak = tl.max(highest, 0)
    # Lanes at the peak count as they are: if it is infinite, the difference would be no number.
    mass = tl.sum(tl.where(highest == peak, total, total * tl.exp(highest - peak)), 0)
    normaliser = peak + tl.log(mass)
    tl.store(nll_C + row, normaliser - target_logit)

    if HAS_WEIGHTS:
        weight = tl.load(weights_C + row).to(tl.float32)
        for offset in range(0, end, BLOCK):
            x = _scores(logits_CV + begin, class_groups_V, offset, skipped, end, target, group, HAS_GROUPS, BLOCK)
            places = offset + tl.arange(0, BLOCK)
            one = tl.where(places == skipped + target, 1.0, 0.0)
            gradient = ((tl.exp(x - normaliser) - one) * weight).to(logits_CV.dtype.element_ty)
            if (offset < skipped) | (offset + BLOCK > end):
                tl.store(logits_CV + begin + places, gradient, mask=(places >= skipped) & (places < end))
            else:
                tl.store(logits_CV + begin + places, gradient)


@triton.jit
def _scores(
    logits_V, class_groups_V, offset, skipped, end, target, group, HAS_GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of a row in float32; minus infinity where there is no class, or one that the group leaves out.

    Only blocks at the ends of a row are masked: a mask over an odd number of classes would make all loads narrow.
    """
    places = offset + tl.arange(0, BLOCK)
    inside = (places >= skipped) & (places < end)
    if (offset < skipped) | (offset + BLOCK > end):
        x = tl.load(logits_V + places, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(logits_V + places).to(tl.float32)
    if HAS_GROUPS:
        class_group = tl.load(class_groups_V + places - skipped, mask=inside, other=0)
        x = tl.where((class_group == group) & (places != skipped + target), float("-inf"), x)
    return x
