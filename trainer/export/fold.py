"""BatchNorm folded into the convolution before it: the same network in evaluation, with fewer layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval


@torch.no_grad()
def fold(model: nn.Module, images: Tensor) -> int:
    """Fold, in place, every BatchNorm2d that is given a convolution's output and nothing else; returns how many.

    Which convolution that is shows in a forward pass of `images`, so names and graphs do not matter. An output that
    something else takes too does not show: whoever folds compares the logits before and after.

    Args:
        model: in evaluation mode, on the CPU.
        images: (n, 3, h, w).
    """
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    calls: dict[nn.Module, int] = {}
    pairs: dict[nn.Module, nn.Module] = {}

    def after(module: nn.Module, _: object, output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        if isinstance(module, nn.Conv2d):
            made[id(output)] = module, output

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made:
            pairs[module] = made[id(inputs[0])][0]

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | _BatchNorm)]
    hooks = [layer.register_forward_hook(after) for layer in layers]
    hooks += [layer.register_forward_pre_hook(before) for layer in layers if isinstance(layer, _BatchNorm)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    names = {module: name for name, module in model.named_modules()}
    folded = 0
    for norm, conv in pairs.items():
        if calls[norm] != 1 or calls[conv] != 1 or norm.running_mean is None or type(conv) is not nn.Conv2d:
            continue
        if norm.weight is None:  # without an affine part, which the formula asks for
            continue
        model.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        model.set_submodule(names[norm], _rest(norm))
        folded += 1
    return folded


def _rest(norm: nn.Module) -> nn.Module:
    """What a norm does beside norming: timm's BatchNormAct2d has an activation."""
    rest = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*rest) if rest else nn.Identity()
