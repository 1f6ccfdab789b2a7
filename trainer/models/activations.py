"""What a forward pass keeps for the backward pass, counted as autograd keeps it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

_IMAGES = 2  # BatchNorm in training refuses a batch of one value a channel


def saved_bytes(model: nn.Module, image_size: int, channels: int = 3) -> Counter[str]:
    """Bytes that autograd holds of one image after a forward pass in training, by the module that first saved them.

    In the number format of the parameters, without those themselves; what two layers save counts once. `model` should
    lie on the device "meta": then nothing is computed and no memory is needed. Its statistics are not to be used
    afterwards. Attention is counted by the kernel that torch picks there.
    """
    names = {module: name for name, module in model.named_modules()}
    parameters = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    inside: list[str] = []
    found: Counter[str] = Counter()
    kept: dict[int, Tensor] = {}  # by storage; held, so that none is freed and its number given to the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in kept and storage._cdata not in parameters:
            kept[storage._cdata] = tensor
            found[inside[-1] if inside else ""] += storage.nbytes()
        return tensor

    hooks = [m.register_forward_pre_hook(lambda m, _: inside.append(names[m])) for m in model.modules()]
    hooks += [m.register_forward_hook(lambda *_: inside.pop() and None) for m in model.modules()]
    first = next(model.parameters())
    training = model.training
    try:
        model.train()
        images = torch.zeros(_IMAGES, channels, image_size, image_size, device=first.device, dtype=first.dtype)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return Counter({name: count // _IMAGES for name, count in found.items()})
