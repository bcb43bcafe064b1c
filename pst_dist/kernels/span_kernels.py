"""Triton kernels over ragged spans: their means, and the gradient of the hidden state.

A span is summed in chunks of CHUNK positions from its start, and then the chunks in order: no atomics, the same bits in
every run and, for hidden states of one width and alignment, however the batch is packed. The gradient kernel looks up
each row's contributions and writes the row once. `launch_table` has the tiles and warps, `triton_backend` the tensors,
grids and checks. Offsets into [B, T, D] are 64-bit throughout.
"""

# Shapes in this file: B sequences, T positions, R = B * T rows, D student width, A spans, K chunks of the longest
# span, N supervised rows. Tensors are pointers here; `width` is D. No `from __future__ import annotations`: Triton
# reads the annotations.

import triton
import triton.language as tl


@triton.jit
def chunk_sums(
    hidden_BTD,
    rows_A,
    starts_A,
    lengths_A,
    out,  # sums [A, K, D], or with WHOLE the means [A, D]
    batch_stride,
    position_stride,
    width,
    chunks,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Sums over CHUNK positions of a span in float32; chunks beyond its end are neither read nor written.

    Grid: (spans x blocks of WIDTH columns, chunks); adjacent programs read the same positions. WHOLE means that every
    span fits one chunk: the means are then written directly, and `span_means` need not run.
    """
    blocks = tl.cdiv(width, WIDTH)
    span = (tl.program_id(0) // blocks).to(tl.int64)
    chunk = tl.program_id(1)
    columns = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    length = tl.load(lengths_A + span).to(tl.int32)
    first = chunk * CHUNK
    if WHOLE or first < length:
        position = tl.load(starts_A + span).to(tl.int64) + first
        start = hidden_BTD + tl.load(rows_A + span).to(tl.int64) * batch_stride + position * position_stride
        last = tl.minimum(CHUNK, length - first)
        # Accumulate a whole tile and reduce it once; reducing in the loop would use shared memory each time.
        total = tl.zeros([TILE, WIDTH], dtype=tl.float32)
        for offset in range(0, last, TILE):
            steps = offset + tl.arange(0, TILE)
            places = start + steps.to(tl.int64)[:, None] * position_stride + columns[None, :]
            total += tl.load(places, mask=(steps < last)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        result = tl.sum(total, 0)
        if WHOLE:
            result = tl.div_rn(result, tl.maximum(length, 1).to(tl.float32))
        tl.store(out + (span * chunks + chunk) * width + columns, result, mask=inside)


@triton.jit
def span_means(
    sums_AKD,
    lengths_A,
    means_AD,
    width,
    chunks,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Means of spans from the sums of their chunks, in a fixed order; zeros for an empty span.

    Grid: spans x blocks of WIDTH columns. `chunks` is K, the number of chunks of the longest span.
    """
    blocks = tl.cdiv(width, WIDTH)
    span = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    length = tl.load(lengths_A + span).to(tl.int32)
    used = tl.cdiv(length, CHUNK)
    total = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    for offset in range(0, used, TILE):
        chunk = offset + tl.arange(0, TILE)
        places = sums_AKD + (span * chunks + chunk)[:, None] * width + columns[None, :]
        total += tl.load(places, mask=(chunk < used)[:, None] & inside[None, :], other=0.0)
    result = tl.div_rn(tl.sum(total, 0), tl.maximum(length, 1).to(tl.float32))
    tl.store(means_AD + span * width + columns, result, mask=inside)


@triton.jit
def hidden_gradient_rows(
    gradient_RD,
    base_BTD,
    rows_gradient_ND,
    rows_upstream,
    slots_R,
    spans_gradient_AD,
    owner_R,
    lengths_A,
    rows,
    positions,
    width,
    base_batch_stride,
    base_position_stride,
    rows_stride,
    spans_stride,
    HAS_BASE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    HAS_SPANS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Every row of the gradient, written once: base + upstream * rows_gradient[slot] + spans_gradient[owner] / length.

    Grid: blocks of TILE rows x blocks of WIDTH columns; `rows` is R, `positions` T. A part whose flag is False is not
    accessed and may be any pointer. A slot or owner below 0 means no contribution.
    """
    blocks = tl.cdiv(width, WIDTH)
    row = (tl.program_id(0) // blocks).to(tl.int64) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    there = row < rows
    inside = columns < width
    total = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    if HAS_BASE:
        start = base_BTD + (row // positions) * base_batch_stride + (row % positions) * base_position_stride
        base = tl.load(start[:, None] + columns[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        total = base.to(gradient_RD.dtype.element_ty).to(tl.float32)
    if HAS_ROWS:
        slot = tl.load(slots_R + row, mask=there, other=-1).to(tl.int64)
        carries = slot >= 0
        # The scale is 0 for rows without a contribution, so that an infinite upstream does not reach them.
        scale = tl.where(carries, 1.0, 0.0)
        if HAS_UPSTREAM:
            scale = tl.where(carries, tl.load(rows_upstream).to(tl.float32), 0.0)
        places = rows_gradient_ND + slot[:, None] * rows_stride + columns[None, :]
        arriving = tl.load(places, mask=carries[:, None] & inside[None, :], other=0.0)
        total += arriving.to(tl.float32) * scale[:, None]
    if HAS_SPANS:
        span = tl.load(owner_R + row, mask=there, other=-1).to(tl.int64)
        pooled = span >= 0
        length = tl.load(lengths_A + span, mask=pooled, other=1)
        share = tl.div_rn(tl.full([TILE], 1.0, tl.float32), tl.maximum(length, 1).to(tl.float32))
        places = spans_gradient_AD + span[:, None] * spans_stride + columns[None, :]
        arriving = tl.load(places, mask=pooled[:, None] & inside[None, :], other=0.0)
        total += arriving.to(tl.float32) * share[:, None]
    places = gradient_RD + row[:, None] * width + columns[None, :]
    tl.store(places, total.to(gradient_RD.dtype.element_ty), mask=there[:, None] & inside[None, :])
