"""The bytes of memory that a training step of ResNet-50 moves: counted, not measured.

    python benchmarks/traffic.py [--size 224]

Each pass reads and writes whole activations in bf16, and one bit a value where a ReLU is kept so; weights, statistics,
the pooling and the head are left out (2 MB an image at batch 256 are the optimiser's). A block of a product reads its
rows once: what several blocks of one row read is in the cache. Megabytes an image, of three ways to do the same step:

    unfused  every convolution, norm, ReLU and addition by itself, as torch does
    fused    precision.fused=true: BatchNorm, addition and ReLU in one pass
    folded   precision.folded=true besides: what gains it is listed
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

BYTES = 2
BIT = 1 / 16  # of a bf16 value
DEPTHS = (3, 4, 6, 3)


@dataclass(frozen=True)
class Block:
    """Values of an image in a bottleneck: its input, what its three convolutions make, and its projection."""

    x: int
    a: int
    b: int
    c: int
    projection: int  # 0: none
    stride: int


def blocks(size: int) -> Iterator[Block]:
    side, width = size // 4, 64
    for stage, depth in enumerate(DEPTHS):
        planes = 64 * 2**stage
        for i in range(depth):
            stride = 2 if stage and not i else 1
            after = side // stride
            out = 4 * planes * after**2
            yield Block(width * side**2, planes * side**2, planes * after**2, out, 0 if i else out, stride)
            side, width = after, 4 * planes


def convolution(inputs: int, outputs: int) -> int:
    """Forward, and the two gradients of backward."""
    return 3 * (inputs + outputs)


def unfused(size: int) -> float:
    """Statistics, the norm, and backward sums and gradient are 8 passes over a norm's values; a ReLU's are 5."""
    image, stem = 3 * size**2, 64 * (size // 2) ** 2
    total = convolution(image, stem) - (image + stem) + 13 * stem
    for each in blocks(size):
        total += convolution(each.x, each.a) + convolution(each.a, each.b) + convolution(each.b, each.c)
        total += 13 * (each.a + each.b) + (13 + 3) * each.c + 3 * each.x
        if each.projection:
            total += convolution(each.x, each.projection) + 8 * each.projection
    return total * BYTES / 1e6


def fused(size: int) -> float:
    image, stem = 3 * size**2, 64 * (size // 2) ** 2
    norm = 3 + 5 + 3 * BIT  # forward and backward, with its ReLU
    total = convolution(image, stem) - (image + stem) + norm * stem
    for each in blocks(size):
        total += convolution(each.x, each.a) + convolution(each.a, each.b) + convolution(each.b, each.c)
        total += norm * (each.a + each.b) + (norm + 2) * each.c  # the shortcut, and its gradient
        total += 3 * each.x  # the sum of the block's two gradients
        if each.projection:  # normed on its way into the sum
            total += convolution(each.x, each.projection) + 3 * each.projection
    return total * BYTES / 1e6


def gains(size: int) -> dict[str, float]:
    """What folding saves of `fused`, by what does it."""
    every = list(blocks(size))
    plain = [each for each in every if each.projection and each.stride == 1]
    gained = {
        "statistics of bn1 by conv1": sum(each.a for each in every),
        "statistics of bn3 by conv3": sum(each.c for each in every),
        "statistics of a projection's norm, stride 1": sum(each.projection for each in plain),
        # Not written, and the input of conv3 read in its place; nor are the ReLU's bits.
        "bn2 and ReLU in front of conv3": sum((2 + BIT) * each.b for each in every),
        # Its sums are those of what is in the registers. conv3's weight gradient reads x as it read the normed x.
        "sums of bn2's gradient by conv3's": sum((1 + 2 * BIT) * each.b for each in every),
        "a shortcut's gradient added by conv1's": sum(2 * each.x for each in every),
    }
    return {name: values * BYTES / 1e6 for name, values in gained.items()}


def folded(size: int) -> float:
    return fused(size) - sum(gains(size).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="a multiple of 32")
    size = parser.parse_args().size
    for way in (unfused, fused, folded):
        print(f"{way.__name__:8} {way(size):6.1f} MB an image, {3.0e6 / way(size):6.0f} images/s at 3.0 TB/s")
    for name, megabytes in gains(size).items():
        print(f"  {megabytes:5.1f} MB  {name}")


if __name__ == "__main__":
    main()
