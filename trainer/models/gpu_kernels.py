"""Triton kernels of BatchNorm, addition and ReLU in channels-last memory, for gpu_norm.py, which imports this late.

An image batch (N, C, H, W) in channels-last memory is a matrix of rows N * H * W by C channels. Sums over the rows come
in two stages, without atomics: slabs of rows, each by one program, then one program over a channel's slabs. So they
are the same bits in every run on one kind of GPU. All sums and statistics are float32.

Whether a ReLU let a value through is one bit: element i of the matrix, counted row by row, is bit i % 8 of byte i // 8.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def moments(x, partial, rows, slab, slabs, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """partial (2, slabs, C): of each slab and channel the mean, and the sum of squared distances from it.

    Summed as distances from the slab's first row, so that a mean far from 0 costs no digits of the variance.
    """
    p = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = p.to(tl.int64) * slab
    count = tl.minimum(slab, rows - p * slab)
    known = c < C
    about = tl.load(x + first * C + c, mask=known, other=0).to(tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        live = (row < count)[:, None] & known[None, :]
        at = row[:, None] * C + c[None, :]
        value = tl.load(x + first * C + at, mask=live, other=0).to(tl.float32)
        distance = tl.where(live, value - about[None, :], 0.0)
        total += distance
        squares += distance * distance
    total = tl.sum(total, 0)
    mean = total / count
    tl.store(partial + p * C + c, about + mean, mask=known)
    tl.store(partial + (slabs + p) * C + c, tl.sum(squares, 0) - total * mean, mask=known)


@triton.jit
def statistics(
    partial,
    mean,
    invstd,
    running_mean,
    running_var,
    tracked,
    rows,
    slab,
    slabs,
    momentum,
    eps,
    unbias,  # rows / (rows - 1)
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean and invstd (C,) from the slabs' moments (Chan et al. 1979); the running statistics move."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    known = c < C
    live = (p < slabs)[:, None] & known[None, :]
    at = p[:, None] * C + c[None, :]
    count = tl.minimum(slab, rows - p * slab).to(tl.float32)[:, None]
    about = tl.load(partial + c, mask=known, other=0)
    off = tl.where(live, tl.load(partial + at, mask=live, other=0) - about[None, :], 0.0)
    shift = tl.sum(off * count, 0) / rows
    off = tl.where(live, off - shift[None, :], 0.0)
    squares = tl.load(partial + slabs * C + at, mask=live, other=0) + off * off * count
    variance = tl.sum(tl.where(live, squares, 0.0), 0) / rows
    tl.store(mean + c, about + shift, mask=known)
    tl.store(invstd + c, 1.0 / tl.sqrt(variance + eps), mask=known)
    before = tl.load(running_mean + c, mask=known, other=0)
    tl.store(running_mean + c, before + momentum * (about + shift - before), mask=known)
    before = tl.load(running_var + c, mask=known, other=0)
    tl.store(running_var + c, before + momentum * (variance * unbias - before), mask=known)
    if tl.program_id(0) == 0:
        tl.store(tracked, tl.load(tracked) + 1)


@triton.jit
def normalise(
    x,
    shortcut,
    y,
    bits,
    mean,
    invstd,
    weight,
    bias,
    its_mean,
    its_invstd,
    its_weight,
    its_bias,
    size,
    C: tl.constexpr,
    ADD: tl.constexpr,
    JOIN: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = relu((x - mean) * invstd * weight + bias + shortcut), and the ReLU's bits; JOIN: of a shortcut normed too."""
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < size - base
    c = ((base % C).to(tl.int32) + i) % C
    value = tl.load(x + base + i, mask=live, other=0).to(tl.float32)
    scale = tl.load(invstd + c) * tl.load(weight + c)
    value = (value - tl.load(mean + c)) * scale + tl.load(bias + c)
    if ADD:
        added = tl.load(shortcut + base + i, mask=live, other=0).to(tl.float32)
        if JOIN:
            scale = tl.load(its_invstd + c) * tl.load(its_weight + c)
            added = (added - tl.load(its_mean + c)) * scale + tl.load(its_bias + c)
        value += added
    if RELU:
        value = tl.where(value <= 0, 0.0, value)  # NaN stays
    rounded = value.to(y.dtype.element_ty)
    tl.store(y + base + i, rounded, mask=live)
    if RELU:  # of the rounded value, which is what torch's ReLU looks at
        bit = tl.where(rounded.to(tl.float32) <= 0, 0, 1) << (i % 8)
        byte = tl.sum(tl.reshape(bit, (BLOCK // 8, 8)), 1)
        j = tl.arange(0, BLOCK // 8)
        tl.store(bits + base // 8 + j, byte.to(tl.uint8), mask=j * 8 < size - base)


@triton.jit
def gradient_sums(
    dy,
    x,
    bits,
    mean,
    shortcut,
    its_mean,
    partial,
    rows,
    slab,
    slabs,
    C: tl.constexpr,
    JOIN: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partial (2, slabs, C): of each slab and channel the sums of g, which is what the ReLU let through of dy, and of
    g * (x - mean); JOIN: (3, slabs, C), the third those of g * (shortcut - its mean)."""
    p = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = p.to(tl.int64) * slab
    count = tl.minimum(slab, rows - p * slab)
    known = c < C
    middle = tl.load(mean + c, mask=known, other=0)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if JOIN:
        its_middle = tl.load(its_mean + c, mask=known, other=0)
        its_products = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        live = (row < count)[:, None] & known[None, :]
        at = first * C + row[:, None] * C + c[None, :]
        g = tl.load(dy + at, mask=live, other=0).to(tl.float32)
        if RELU:
            byte = tl.load(bits + at // 8, mask=live, other=0).to(tl.int32)
            g = tl.where(((byte >> (at % 8).to(tl.int32)) & 1) == 1, g, 0.0)
        value = tl.load(x + at, mask=live, other=0).to(tl.float32)
        total += g
        products += g * (value - middle[None, :])
        if JOIN:
            value = tl.load(shortcut + at, mask=live, other=0).to(tl.float32)
            its_products += g * (value - its_middle[None, :])
    tl.store(partial + p * C + c, tl.sum(total, 0), mask=known)
    tl.store(partial + (slabs + p) * C + c, tl.sum(products, 0), mask=known)
    if JOIN:
        tl.store(partial + (2 * slabs + p) * C + c, tl.sum(its_products, 0), mask=known)


@triton.jit
def gradient_coefficients(
    partial,
    invstd,
    weight,
    dweight,
    dbias,
    coefficients,
    rows,
    slabs,
    which,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dweight and dbias (C,), and coefficients (3, C) with which dx = c0 * g + c1 * (x - mean) + c2.

    The sums of g are partial[0], those of the products partial[which].
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    known = c < C
    live = (p < slabs)[:, None] & known[None, :]
    at = p[:, None] * C + c[None, :]
    total = tl.sum(tl.load(partial + at, mask=live, other=0), 0)
    product = tl.sum(tl.load(partial + which * slabs * C + at, mask=live, other=0), 0)
    inverse = tl.load(invstd + c, mask=known, other=0)
    scale = tl.load(weight + c, mask=known, other=0) * inverse
    tl.store(dweight + c, product * inverse, mask=known)
    tl.store(dbias + c, total, mask=known)
    tl.store(coefficients + c, scale, mask=known)
    tl.store(coefficients + C + c, -scale * inverse * inverse * product / rows, mask=known)
    tl.store(coefficients + 2 * C + c, -scale * total / rows, mask=known)


@triton.jit
def gradient(
    dy,
    x,
    bits,
    dx,
    passed,
    mean,
    coefficients,
    shortcut,
    its_mean,
    its_coefficients,
    size,
    C: tl.constexpr,
    ADD: tl.constexpr,
    JOIN: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx, and `passed`, the gradient of a shortcut: what the ReLU let through of dy, JOIN: through its norm too."""
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < size - base
    c = ((base % C).to(tl.int32) + i) % C
    g = tl.load(dy + base + i, mask=live, other=0).to(tl.float32)
    if RELU:
        byte = tl.load(bits + base // 8 + i // 8, mask=live, other=0).to(tl.int32)
        g = tl.where(((byte >> (i % 8)) & 1) == 1, g, 0.0)
    value = tl.load(x + base + i, mask=live, other=0).to(tl.float32) - tl.load(mean + c)
    scale, slope = tl.load(coefficients + c), tl.load(coefficients + C + c)
    result = scale * g + slope * value + tl.load(coefficients + 2 * C + c)
    tl.store(dx + base + i, result.to(dx.dtype.element_ty), mask=live)
    if ADD:
        if JOIN:
            value = tl.load(shortcut + base + i, mask=live, other=0).to(tl.float32) - tl.load(its_mean + c)
            scale, slope = tl.load(its_coefficients + c), tl.load(its_coefficients + C + c)
            g = scale * g + slope * value + tl.load(its_coefficients + 2 * C + c)
        tl.store(passed + base + i, g.to(passed.dtype.element_ty), mask=live)
