"""The first convolution on 2x2 blocks of pixels is the convolution that it was."""

from __future__ import annotations

import pytest
import torch
from nets import ALONE, images, ours, same, torchvisions
from torch import nn

from trainer import learner
from trainer.config import Config, ConfigError, Data, Model, Precision
from trainer.data.loader import DataSet
from trainer.models.packed_stem import PackedStem, pack, packed_images
from trainer.plan import Plan


@pytest.mark.parametrize("size", [(32, 32), (33, 32), (32, 35), (41, 37), (8, 8)])
def test_outputs_and_gradients_are_those_of_the_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3, bias=False).double()
    packed = nn.Sequential(nn.Conv2d(3, 16, kernel_size=7, stride=2, padding=3, bias=False).double())
    packed[0].load_state_dict(plain.state_dict())
    assert pack(packed) and type(packed[0]) is PackedStem
    x, other = (torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.manual_seed(1)) for _ in range(2))
    assert torch.equal(x, other)
    y, expected = packed(x.requires_grad_()), plain(other.requires_grad_())
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    coming = torch.randn_like(y)
    y.backward(coming)
    expected.backward(coming)
    torch.testing.assert_close(packed[0].weight.grad, plain.weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_a_packed_image_is_channels_last_of_autocasts_dtype_and_padded() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        packed = packed_images(images(2, 32))
    assert packed.shape == (2, 16, 19, 19) and packed.dtype is torch.bfloat16
    assert packed.is_contiguous(memory_format=torch.channels_last)
    assert not packed[:, 12:].any() and not packed[:, :, :2].any() and not packed[..., -1].any()


def test_a_network_keeps_its_keys_and_its_answers() -> None:
    plain, packed = ours("resnet18"), ours("resnet18")
    assert pack(packed) and same(plain.state_dict(), packed.state_dict())
    x = images(2, 64)
    torch.testing.assert_close(packed.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    assert pack(torchvisions("resnet18"))


def test_another_first_convolution_is_refused() -> None:
    assert not pack(ours("resnet20")) and not pack(ours("resnet50", variant="d"))
    data = Data(source="synthetic", synthetic_classes=5, synthetic_samples=16, image_size=32)
    config = Config(data=data, model=Model(name="resnet20"), precision=Precision(packed_stem=True), global_batch_size=8)
    given = DataSet(None, None, 16, tuple("abcde"), "synthetic")
    with pytest.raises(
        ConfigError, match=r"precision\.packed_stem=true packs .* model\.name=resnet20 begins with another"
    ):
        learner.create(config, Plan.of(config, 1, 16), ALONE, given)
