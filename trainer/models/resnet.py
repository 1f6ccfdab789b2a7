"""Our ResNets: the ImageNet and the CIFAR nets of He et al. 2015 (arXiv:1512.03385), and their usual variants.

Layer names, shapes, arithmetic and initialisation are torchvision's for v1.5, so a state dict of either loads strictly
into the other; variant d has the names of timm's resnet50d for the same reason.

Every ReLU but those inside the deep stem goes through `norm_relu` or `Block.join`: there BatchNorm, addition and ReLU
are fused.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config import ConfigError, Model
from trainer.models.fused_norm import FusedBatchNorm2d


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A pointwise convolution; BatchNorm follows, so it has no bias."""
    return nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1; BatchNorm follows, so it has no bias."""
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)


def norm_relu(norm: nn.Module, x: Tensor) -> Tensor:
    """relu(norm(x)), of the shape of x."""
    if isinstance(norm, FusedBatchNorm2d):
        return norm.add_relu(x)
    return F.relu(norm(x), inplace=True)


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """`branch` (N, C, H, W) with each sample zeroed at probability `rate`, the others scaled by 1 / (1 - rate).

    Stochastic depth, Huang et al. 2016 (arXiv:1603.09382); the scaling keeps the expectation, so that evaluation needs
    none. Draws from torch's generator of the device.
    """
    keep = 1.0 - rate
    kept = branch.new_empty((branch.shape[0], 1, 1, 1)).bernoulli_(keep)
    return branch * kept.div_(keep)


class PadShortcut(nn.Module):
    """Option A of the paper: (N, C, H, W) to (N, C + channels, H / stride, W / stride), without parameters.

    The paper does not say where the zero channels go; they come last, as in facebookarchive/fb.resnet.torch,
    models/resnet.lua.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.channels))


def make_shortcut(option: str, inputs: int, outputs: int, stride: int, *, pooled: bool) -> nn.Module:
    """The shortcut of a block under option A, B or C of the paper: identity, padding or projection.

    A `pooled` projection averages 2x2 pixels instead of skipping three of four (variant d). Its pooling rounds up,
    so that odd sizes agree with the strided 3x3 of the branch, and its layers are numbered as timm's.
    """
    if stride == 1 and inputs == outputs and option != "C":
        return nn.Identity()
    if option == "A":
        return PadShortcut(outputs - inputs, stride)
    if pooled:
        pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        return nn.Sequential(pool, conv1x1(inputs, outputs), nn.BatchNorm2d(outputs))
    return nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """What the two kinds of block share: how the branch and the shortcut meet."""

    expansion: int
    downsample: nn.Module | None  # the shortcut, named as in torchvision; None: a plain network, which has none
    drop_path_rate = 0.0  # the network sets it, by depth

    def join(self, norm: nn.Module, branch: Tensor, x: Tensor) -> Tensor:
        """relu(norm(branch) + shortcut(x)), x being the input of the block; relu(norm(branch)) when plain."""
        if self.downsample is None:
            return norm_relu(norm, branch)
        drops = self.training and self.drop_path_rate > 0
        if isinstance(norm, FusedBatchNorm2d) and not drops:
            if not norm.joins or not isinstance(self.downsample, nn.Sequential):
                return norm.add_relu(branch, self.downsample(x))
            *layers, last = self.downsample  # a projection, and its norm
            for layer in layers:
                x = layer(x)
            return norm.add_relu(branch, x, last)
        branch = norm(branch)
        if drops:
            branch = drop_path(branch, self.drop_path_rate)
        return F.relu(branch.add_(self.downsample(x)), inplace=True)

    def last_norm(self) -> nn.BatchNorm2d:
        """The norm whose gamma scales the whole branch."""
        raise NotImplementedError


class BasicBlock(Block):
    """Two 3x3 convolutions (N, inputs, H, W) -> (N, planes, H / stride, W / stride); v1 and v1.5 are the same."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None, variant: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        branch = norm_relu(self.bn1, self.conv1(x))
        return self.join(self.bn2, self.conv2(branch), x)

    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2


class Bottleneck(Block):
    """1x1, 3x3, 1x1 convolutions (N, inputs, H, W) -> (N, 4 planes, H / stride, W / stride).

    The paper strides the first 1x1 (v1); everyone since strides the 3x3 (v1.5), which sees all pixels.
    """

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, downsample: nn.Module | None, variant: str) -> None:
        super().__init__()
        first, second = (stride, 1) if variant == "v1" else (1, stride)
        self.conv1 = conv1x1(inputs, planes, first)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, second)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        branch = norm_relu(self.bn1, self.conv1(x))
        branch = norm_relu(self.bn2, self.conv2(branch))
        return self.join(self.bn3, self.conv3(branch), x)

    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3


# Blocks of each stage: Table 1 and section 4.2 of the paper. Four stages are an ImageNet net, three a CIFAR net.
IMAGENET: dict[str, tuple[type[Block], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}
CIFAR: dict[str, tuple[type[Block], tuple[int, ...]]] = {
    "resnet20": (BasicBlock, (3, 3, 3)),
    "resnet32": (BasicBlock, (5, 5, 5)),
    "resnet44": (BasicBlock, (7, 7, 7)),
    "resnet56": (BasicBlock, (9, 9, 9)),
    "resnet110": (BasicBlock, (18, 18, 18)),
}
FAMILY = IMAGENET | CIFAR


def check_options(options: Model) -> None:
    """Raises ConfigError for options of one of our networks that contradict each other."""
    if not options.residual:
        for key in ("zero_init_residual", "drop_path_rate", "shortcut"):
            if getattr(options, key):
                raise ConfigError(
                    f"model.{key}={getattr(options, key)} needs shortcuts, and model.residual=false has none: "
                    f"leave model.{key} out or set model.residual=true"
                )
    if options.variant == "d" and options.name in CIFAR:
        raise ConfigError(
            f"model.variant=d is for the ImageNet nets, {options.name} has no large stem to replace: "
            "leave model.variant out"
        )
    if options.variant == "d" and options.shortcut == "A":
        raise ConfigError(
            "model.shortcut=A has no projection for model.variant=d to average before: use model.shortcut=B"
        )


class ResNet(nn.Module):
    """A ResNet, or its plain twin: images (N, 3, H, W), normalised, to logits (N, num_classes).

    `options.name` is a key of FAMILY; `options.num_classes` and `options.weights` are the caller's to resolve.
    Raises ConfigError where options contradict each other.
    """

    def __init__(self, options: Model, num_classes: int) -> None:
        super().__init__()
        check_options(options)
        block, depths = FAMILY[options.name]
        small = options.name in CIFAR
        self.stride = 2 ** (len(depths) - 1) * (1 if small else 4)  # pixels of the image to one of the last stage
        planes = 16 if small else 64
        self.conv1 = make_stem(planes, small=small, deep=options.variant == "d")
        self.bn1 = nn.BatchNorm2d(planes)
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.stage_names = [f"layer{i}" for i in range(1, len(depths) + 1)]
        width = planes
        for i, (name, depth) in enumerate(zip(self.stage_names, depths)):
            stage = make_stage(options, block, (width, planes * 2**i), depth, stride=1 if i == 0 else 2)
            self.add_module(name, stage)
            width = planes * 2**i * block.expansion
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(options.drop_rate)
        self.fc = nn.Linear(width, num_classes)
        self._spread_drop_path(options.drop_path_rate)
        self._initialise(options)

    def stages(self) -> list[nn.Sequential]:
        """The stages of equal size, each a sequence of blocks."""
        return [getattr(self, name) for name in self.stage_names]

    def blocks(self) -> list[Block]:
        """All blocks, in the order of the forward pass."""
        return [block for stage in self.stages() for block in stage]

    def forward(self, x: Tensor) -> Tensor:
        x = norm_relu(self.bn1, self.conv1(x))
        x = self.maxpool(x)
        for stage in self.stages():
            x = stage(x)
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(self.dropout(x))

    def _spread_drop_path(self, rate: float) -> None:
        # From 0 at the first block to `rate` at the last, as timm does; Huang et al. start one step above 0.
        blocks = self.blocks()
        for i, block in enumerate(blocks):
            block.drop_path_rate = rate * i / (len(blocks) - 1)

    def _initialise(self, options: Model) -> None:
        # In torchvision's order: the same seed gives the same weights. The head keeps the default of nn.Linear, and
        # BatchNorm is born with gamma 1 and beta 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode=options.conv_init, nonlinearity="relu")
        if options.zero_init_residual:
            for block in self.blocks():
                nn.init.zeros_(block.last_norm().weight)


def make_stem(planes: int, *, small: bool, deep: bool) -> nn.Module:
    """The convolutions before the first norm: 3x3 (CIFAR), 7x7 at stride 2, or three 3x3 of stride 2, 1, 1 (d)."""
    if small:
        return conv3x3(3, planes)
    if not deep:
        return nn.Conv2d(3, planes, kernel_size=7, stride=2, padding=3, bias=False)
    half = planes // 2
    return nn.Sequential(
        conv3x3(3, half, stride=2),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        conv3x3(half, half),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        conv3x3(half, planes),
    )


def make_stage(
    options: Model, block: type[Block], widths: tuple[int, int], depth: int, *, stride: int
) -> nn.Sequential:
    """`depth` blocks from widths[0] channels to widths[1] * expansion, the first one at `stride`."""
    inputs, planes = widths
    outputs = planes * block.expansion
    option = options.shortcut or ("A" if options.name in CIFAR else "B")
    blocks = []
    for _ in range(depth):
        shortcut = None
        if options.residual:
            shortcut = make_shortcut(option, inputs, outputs, stride, pooled=options.variant == "d")
        blocks.append(block(inputs, planes, stride, shortcut, options.variant))
        inputs, stride = outputs, 1
    return nn.Sequential(*blocks)
