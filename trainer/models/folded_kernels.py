"""Triton kernels of 1x1 convolutions that do BatchNorm's work with their own, for folded.py, which imports this late.

In channels-last memory a 1x1 convolution is a product of matrices: rows N * H * W of x by the transposed weight. What
is said in gpu_kernels.py of rows, slabs and sums holds here. Products are summed in float32. A value is rounded to the
type of its tensor before anything is computed of it, so that one that is never written is the one that would have been.

WIDE: operands are multiplied as float32, for Triton's interpreter, which has no bf16; their products are the same.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _below(i, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """i < LIMIT, of BLOCK indices; known to the compiler where blocks fill the limit, so that it forms no masks."""
    if LIMIT % BLOCK == 0:
        return tl.full((BLOCK,), True, tl.int1)
    return i < LIMIT


@triton.jit
def _normed(value, mean, invstd, gamma, beta, c, known):
    """relu((value - mean) * invstd * gamma + beta), of channels c along the second axis, float32; as `normalise`."""
    scale = tl.load(invstd + c, mask=known, other=0) * tl.load(gamma + c, mask=known, other=0)
    middle, shift = tl.load(mean + c, mask=known, other=0), tl.load(beta + c, mask=known, other=0)
    value = (value.to(tl.float32) - middle[None, :]) * scale[None, :] + shift[None, :]
    return tl.where(value <= 0, 0.0, value)  # NaN stays


@triton.jit
def _multiplied(
    x,
    weight,
    row,
    live,
    out,
    known,
    mean,
    invstd,
    gamma,
    beta,
    INNER: tl.constexpr,
    STRIDE_OUT: tl.constexpr,  # of weight
    STRIDE_IN: tl.constexpr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """Rows `row` of x (rows, INNER), NORM: of relu(norm(x)), by the columns `out` of the weight; float32."""
    product = tl.zeros((BLOCK_R, BLOCK_OUT), tl.float32)
    for start in range(0, INNER, BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        there = _below(k, INNER, BLOCK_IN)
        left = tl.load(x + row[:, None] * INNER + k[None, :], mask=live[:, None] & there[None, :], other=0)
        if NORM:
            left = _normed(left, mean, invstd, gamma, beta, k, there).to(x.dtype.element_ty)
        at = out[None, :] * STRIDE_OUT + k[:, None] * STRIDE_IN
        right = tl.load(weight + at, mask=there[:, None] & known[None, :], other=0)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, right, product, input_precision=PRECISION)
    return product


@triton.jit
def product(
    x,
    weight,
    y,
    partial,
    mean,
    invstd,
    gamma,
    beta,
    rows,
    slab,
    slabs,
    INNER: tl.constexpr,
    C: tl.constexpr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """y (rows, C) = x (rows, INNER) by weight (C, INNER) transposed, NORM: of relu(norm(x)); partial as in `moments`.

    A slab's moments are those of its blocks of rows, put together one after the other (Chan et al. 1979).
    """
    p = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = p.to(tl.int64) * slab
    count = tl.minimum(slab, rows - p * slab)
    known = _below(c, C, BLOCK_OUT)
    average = tl.zeros((BLOCK_OUT,), tl.float32)
    squares = tl.zeros((BLOCK_OUT,), tl.float32)
    for start in range(0, count, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        live = row < count
        value = _multiplied(
            x + first * INNER,
            weight,
            row,
            live,
            c,
            known,
            mean,
            invstd,
            gamma,
            beta,
            INNER,
            INNER,
            1,
            NORM,
            WIDE,
            PRECISION,
            BLOCK_R,
            BLOCK_OUT,
            BLOCK_IN,
        )
        rounded = value.to(y.dtype.element_ty)
        at = row[:, None] * C + c[None, :]
        tl.store(y + first * C + at, rounded, mask=live[:, None] & known[None, :])
        value = tl.where(live[:, None], rounded.to(tl.float32), 0.0)
        here = tl.minimum(BLOCK_R, count - start).to(tl.float32)
        its_average = tl.sum(value, 0) / here
        off = tl.where(live[:, None], value - its_average[None, :], 0.0)
        share = here / (start + here)
        step = its_average - average
        average += step * share
        squares += tl.sum(off * off, 0) + step * step * share * start
    tl.store(partial + p * C + c, average, mask=known)
    tl.store(partial + (slabs + p) * C + c, squares, mask=known)


@triton.jit
def input_gradient(
    dy,
    weight,
    dx,
    added,
    x,
    partial,
    mean,
    invstd,
    gamma,
    beta,
    rows,
    slab,
    slabs,
    INNER: tl.constexpr,
    C: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """dx (rows, C) = dy (rows, INNER) by weight (INNER, C); ADD: and `added` (rows, C).

    NORM: what the ReLU of relu(norm(x)) lets through of it, and partial (2, slabs, C) as in `gradient_sums`.
    """
    p = tl.program_id(1)
    c = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = p.to(tl.int64) * slab
    count = tl.minimum(slab, rows - p * slab)
    known = _below(c, C, BLOCK_OUT)
    if NORM:
        middle = tl.load(mean + c, mask=known, other=0)
        total = tl.zeros((BLOCK_OUT,), tl.float32)
        products = tl.zeros((BLOCK_OUT,), tl.float32)
    for start in range(0, count, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        live = row < count
        g = _multiplied(
            dy + first * INNER,
            weight,
            row,
            live,
            c,
            known,
            mean,
            invstd,
            gamma,
            beta,
            INNER,
            1,
            C,
            False,
            WIDE,
            PRECISION,
            BLOCK_R,
            BLOCK_OUT,
            BLOCK_IN,
        )
        at = first * C + row[:, None] * C + c[None, :]
        inside = live[:, None] & known[None, :]
        if ADD:
            g += tl.load(added + at, mask=inside, other=0).to(tl.float32)
        rounded = g.to(dx.dtype.element_ty)
        if NORM:
            value = tl.load(x + at, mask=inside, other=0)
            passed = _normed(value, mean, invstd, gamma, beta, c, known).to(x.dtype.element_ty)
            g = tl.where(passed.to(tl.float32) <= 0, 0.0, rounded.to(tl.float32))  # 0 where no row is
            total += tl.sum(g, 0)
            products += tl.sum(g * (value.to(tl.float32) - middle[None, :]), 0)
            rounded = g.to(dx.dtype.element_ty)
        tl.store(dx + at, rounded, mask=inside)
    if NORM:
        tl.store(partial + p * C + c, total, mask=known)
        tl.store(partial + (slabs + p) * C + c, products, mask=known)


@triton.jit
def weight_gradient(
    dy,
    x,
    partial,
    mean,
    invstd,
    gamma,
    beta,
    rows,
    slab,
    INNER: tl.constexpr,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """partial (slabs, C, INNER): of each slab dy (rows, C) transposed by relu(norm(x)), x (rows, INNER)."""
    p = tl.program_id(2)
    c = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    k = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    first = p.to(tl.int64) * slab
    count = tl.minimum(slab, rows - p * slab)
    known, there = _below(c, C, BLOCK_OUT), _below(k, INNER, BLOCK_IN)
    product = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in range(0, count, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        live = row < count
        at = row[:, None] * C + c[None, :]
        left = tl.load(dy + first * C + at, mask=live[:, None] & known[None, :], other=0)
        at = row[:, None] * INNER + k[None, :]
        right = tl.load(x + first * INNER + at, mask=live[:, None] & there[None, :], other=0)
        right = tl.where(live[:, None], _normed(right, mean, invstd, gamma, beta, k, there), 0.0)
        right = right.to(x.dtype.element_ty)
        if WIDE:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(tl.trans(left), right, product, input_precision=PRECISION)
    at = p.to(tl.int64) * C * INNER + c[:, None] * INNER + k[None, :]
    tl.store(partial + at, product, mask=known[:, None] & there[None, :])
