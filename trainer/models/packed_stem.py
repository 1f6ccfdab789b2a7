"""The first convolution on 2x2 blocks of pixels: the same function, at half the size and with more channels.

An image has three channels, and the units that multiply bf16 take sixteen at once: the 7x7 convolution at stride 2
leaves most of them idle. Two by two pixels as one of 12 channels (space-to-depth, in MLPerf's submissions) make of it a
4x4 convolution at stride 1. The parameter stays 7x7, under its name, so state dicts are what they were.

Not measured on a GPU. precision.packed_stem=true asks for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 16  # of a packed image; 12, and zeros to a multiple of 8


class PackedStem(nn.Conv2d):
    """A 7x7 convolution of stride 2 and padding 3. Made of nn.Conv2d by changing its class."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(packed_images(x), packed_weight(self.weight), self.bias)


def packed_images(x: Tensor) -> Tensor:
    """Images (N, 3, H, W) as (N, 16, ceil(H / 2) + 3, ceil(W / 2) + 3), channels-last: two zeros before, one after.

    Of the dtype that autocast would cast them to, in the same pass.
    """
    n, channels, height, width = x.shape
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    h, w = x.shape[2] // 2, x.shape[3] // 2
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    # As rows of pixels, which is channels-last memory; what is not written is padding.
    packed = torch.zeros(n, h + 3, w + 3, CHANNELS, dtype=dtype, device=x.device).permute(0, 3, 1, 2)
    blocks = x.unflatten(2, (h, 2)).unflatten(4, (w, 2)).permute(0, 3, 5, 1, 2, 4)  # (N, 2, 2, 3, h, w)
    packed[:, : 4 * channels, 2 : 2 + h, 2 : 2 + w].unflatten(1, (2, 2, channels)).copy_(blocks)
    return packed


def packed_weight(weight: Tensor) -> Tensor:
    """(outputs, 3, 7, 7) as (outputs, 16, 4, 4).

    Output pixel i sees the rows 2i - 3 to 2i + 3: with one of zeros before them, the pairs i - 2 to i + 1.
    """
    outputs, channels = weight.shape[:2]
    pairs = F.pad(weight, (1, 0, 1, 0)).view(outputs, channels, 4, 2, 4, 2)
    blocks = pairs.permute(0, 3, 5, 1, 2, 4).reshape(outputs, 4 * channels, 4, 4)
    return F.pad(blocks, (0, 0, 0, 0, 0, CHANNELS - 4 * channels))


def pack(model: nn.Module) -> bool:
    """Make, in place, the first convolution of `model` a PackedStem; False where it is another than that of 7x7."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if type(first) is not nn.Conv2d or first.padding_mode != "zeros":
        return False
    shape = first.in_channels, first.kernel_size, first.stride, first.padding, first.dilation, first.groups
    if shape != (3, (7, 7), (2, 2), (3, 3), (1, 1), 1):
        return False
    first.__class__ = PackedStem
    return True
