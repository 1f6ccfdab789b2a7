"""BlurPool: what is about to lose three of four pixels is blurred first (Zhang, arXiv:1904.11486)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_CHANNELS = 16  # convolutions of fewer inputs stay as they are, as in FFCV and Composer: the stem sees the image


def blur(x: Tensor, stride: int = 1) -> Tensor:
    """x (N, C, H, W) under the kernel [1, 2, 1] x [1, 2, 1] / 16, zeros around it; then every stride-th pixel."""
    row = torch.tensor([1.0, 2.0, 1.0], device=x.device, dtype=x.dtype) / 4
    kernel = (row[:, None] * row).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, kernel, stride=stride, padding=1, groups=x.shape[1])


class BlurConv2d(nn.Conv2d):
    """A strided convolution of the blurred input; its parameters keep their names."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(blur(x))


class BlurMaxPool2d(nn.MaxPool2d):
    """The maximum around every pixel, of which the blurred image then loses its pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return blur(F.max_pool2d(x, self.kernel_size, 1, self.padding, self.dilation, self.ceil_mode), self.stride)


def antialias(model: nn.Module, *, pooling: bool) -> None:
    """Blur, in place, before every strided convolution of `model` and, if `pooling`, within its max-pooling."""
    for module in model.modules():
        # Changing the class keeps weights, hooks and names, and finds them in timm's and torchvision's networks too.
        if type(module) is nn.Conv2d and max(module.stride) > 1 and module.in_channels >= FEWEST_CHANNELS:
            module.__class__ = BlurConv2d
        elif type(module) is nn.MaxPool2d and pooling:
            module.__class__ = BlurMaxPool2d
