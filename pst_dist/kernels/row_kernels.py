"""Triton kernels over single rows: the distance of a projected span to its teacher's vector, and its gradient.

One program handles one row of any width in blocks. There are a few hundred rows, which fit the cache, so these kernels
cost little more than their launch. `triton_backend` has the tensors and grids.
"""

# Shapes in this file: A spans, E teacher width (`width`). Tensors are pointers here.

import triton
import triton.language as tl


@triton.jit
def row_distances(
    student_AE,
    teacher_AE,
    distances_A,
    cosines_A,
    statistics_A3,
    width,
    student_stride,
    teacher_stride,
    eps,
    longest_inverse,  # 1 / eps
    HUBER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Distances (1 - cosine, or with HUBER the summed smooth L1 of the unit vectors), cosines and statistics.

    Grid: rows. The statistics are (cosine, 1 / norm of the student, 1 / norm of the teacher).
    """
    row = tl.program_id(0).to(tl.int64)
    student = student_AE + row * student_stride
    teacher = teacher_AE + row * teacher_stride
    student_square = tl.zeros([BLOCK], dtype=tl.float32)
    teacher_square = tl.zeros([BLOCK], dtype=tl.float32)
    product = tl.zeros([BLOCK], dtype=tl.float32)
    for offset in range(0, width, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        inside = columns < width
        y = tl.load(student + columns, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(teacher + columns, mask=inside, other=0.0).to(tl.float32)
        student_square += y * y
        teacher_square += z * z
        product += y * z
    inverse_student = _inverse_norm(tl.sum(student_square, 0), eps, longest_inverse)
    inverse_teacher = _inverse_norm(tl.sum(teacher_square, 0), eps, longest_inverse)
    cosine = tl.sum(product, 0) * inverse_student * inverse_teacher
    distance = 1.0 - cosine
    if HUBER:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for offset in range(0, width, BLOCK):
            columns = offset + tl.arange(0, BLOCK)
            inside = columns < width
            y = tl.load(student + columns, mask=inside, other=0.0).to(tl.float32) * inverse_student
            z = tl.load(teacher + columns, mask=inside, other=0.0).to(tl.float32) * inverse_teacher
            gap = tl.abs(y - z)
            total += tl.where(gap < 1.0, 0.5 * gap * gap, gap - 0.5)
        distance = tl.sum(total, 0)
    tl.store(distances_A + row, distance)
    tl.store(cosines_A + row, cosine)
    tl.store(statistics_A3 + row * 3, cosine)
    tl.store(statistics_A3 + row * 3 + 1, inverse_student)
    tl.store(statistics_A3 + row * 3 + 2, inverse_teacher)


@triton.jit
def row_distance_gradients(
    student_AE,
    teacher_AE,
    statistics_A3,
    upstream_A,
    gradient_AE,
    width,
    student_stride,
    teacher_stride,
    upstream_stride,
    longest_inverse,  # 1 / eps
    HUBER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of sum(upstream * distance) to the student's rows. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    student = student_AE + row * student_stride
    teacher = teacher_AE + row * teacher_stride
    along = -tl.load(statistics_A3 + row * 3)
    inverse_student = tl.load(statistics_A3 + row * 3 + 1)
    inverse_teacher = tl.load(statistics_A3 + row * 3 + 2)
    scale = tl.load(upstream_A + row * upstream_stride).to(tl.float32) * inverse_student
    if HUBER:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for offset in range(0, width, BLOCK):
            columns = offset + tl.arange(0, BLOCK)
            inside = columns < width
            y = tl.load(student + columns, mask=inside, other=0.0).to(tl.float32) * inverse_student
            z = tl.load(teacher + columns, mask=inside, other=0.0).to(tl.float32) * inverse_teacher
            total += tl.minimum(tl.maximum(y - z, -1.0), 1.0) * y
        along = tl.sum(total, 0)
    # A student shorter than eps was divided by the constant eps, so its gradient has no component along it.
    along = tl.where(inverse_student < longest_inverse, along, 0.0)
    for offset in range(0, width, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        inside = columns < width
        y = tl.load(student + columns, mask=inside, other=0.0).to(tl.float32) * inverse_student
        z = tl.load(teacher + columns, mask=inside, other=0.0).to(tl.float32) * inverse_teacher
        pull = -z
        if HUBER:
            pull = tl.minimum(tl.maximum(y - z, -1.0), 1.0)
        gradient = (pull - along * y) * scale
        tl.store(gradient_AE + row * width + columns, gradient.to(gradient_AE.dtype.element_ty), mask=inside)


@triton.jit
def _inverse_norm(square, eps, longest_inverse):
    """1 / max(norm, eps); exactly 1 / eps for short vectors, by which the gradient recognises them."""
    norm = tl.sqrt_rn(square)
    return tl.where(norm > eps, tl.div_rn(1.0, norm), longest_inverse)
