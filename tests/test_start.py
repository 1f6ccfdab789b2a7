"""BlurPool, initial values, image sizes, and weights under a new head."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from nets import images, ours, same, torchvisions
from torch import nn
from torch.nn import functional

from trainer.config import ConfigError, Model
from trainer.models.blurpool import BlurConv2d, BlurMaxPool2d, antialias, blur
from trainer.models.build import create, load_weights
from trainer.models.start import check_sizes, head


@pytest.mark.parametrize("stride", [1, 2])
def test_the_blur_is_its_kernel(stride: int) -> None:
    x = images(2, 9)
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    padded = functional.pad(x, (1, 1, 1, 1))
    expected = torch.stack([padded[:, :, i : i + 9, j : j + 9] * kernel[i, j] for i in range(3) for j in range(3)])
    torch.testing.assert_close(blur(x, stride), expected.sum(0)[:, :, ::stride, ::stride])
    assert blur(torch.ones(1, 2, 5, 5))[0, 0, 2, 2] == 1, "a plain surface stays as it is"


def test_all_that_strides_is_blurred_and_keeps_its_names() -> None:
    plain, convs, everything = (ours("resnet50", blurpool=kind) for kind in ("none", "convs", "all"))
    blurred = [name for name, module in convs.named_modules() if isinstance(module, BlurConv2d)]
    # FFCV's rule: stride above 1 and at least 16 inputs. The 3x3 and the shortcut of three stages; not the stem.
    assert blurred == [f"layer{i}.0.{part}" for i in (2, 3, 4) for part in ("conv2", "downsample.0")]
    assert not isinstance(convs.maxpool, BlurMaxPool2d) and isinstance(everything.maxpool, BlurMaxPool2d)
    assert same(plain.state_dict(), convs.state_dict()) and same(plain.state_dict(), everything.state_dict())
    theirs = torchvisions("resnet50").eval()
    theirs.load_state_dict(plain.state_dict())
    antialias(theirs, pooling=True)
    with torch.no_grad():
        torch.testing.assert_close(everything.eval()(images()), theirs(images()))
        assert not torch.allclose(everything(images()), convs.eval()(images()))


def test_a_head_as_sure_as_guessing_and_gammas_that_are_drawn() -> None:
    model = ours("resnet20", head_prior=True, norm_init="uniform")
    assert (model.fc.bias == -torch.tensor(10.0).log()).all() and head(model) is model.fc
    gammas = torch.cat([m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)])
    assert gammas.min() >= 0 and gammas.max() <= 1 and abs(gammas.mean() - 0.5) < 0.05
    guess = torch.sigmoid(torch.tensor(-math.log(10)))
    assert torch.sigmoid(model.fc.bias).allclose(guess)


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet18", "torchvision:resnet18"])
def test_weights_of_other_classes_come_in_under_a_new_head(name: str, tmp_path: Path) -> None:
    before, after = create(Model(name=name), 10), create(Model(name=name), 4)
    torch.save(before.state_dict(), tmp_path / "ten.pt")
    with pytest.raises(ConfigError, match=r"has 10 classes .* set model\.new_head=true"):
        load_weights(after, tmp_path / "ten.pt")
    own = {key: value.clone() for key, value in after.state_dict().items() if key.startswith("fc.")}
    load_weights(after, tmp_path / "ten.pt", new_head=True)
    for key, value in after.state_dict().items():
        assert torch.equal(value, own.get(key, before.state_dict()[key])), key
    assert len(own) == 2


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("resnet50", 31, "its stride is 32"),
        ("resnet20", 3, "its stride is 4"),
        ("timm:vit_tiny_patch16_224", 96, r"[Ii]nput .*96"),
    ],
)
def test_a_size_that_the_network_cannot_take_is_refused_naming_both_keys(name: str, size: int, reason: str) -> None:
    options = Model(name=name)
    model = create(options, 4)
    with pytest.raises(ConfigError, match=rf"data\.start_size={size} does not fit model\.name={name} .*{reason}"):
        check_sizes(options, model, {"data.start_size": size})
    check_sizes(options, model, {"data.image_size": 224 if name.startswith("timm") else 32})
    assert model.training
