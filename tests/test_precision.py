"""Number formats that a processor is faster at."""

from __future__ import annotations

import pytest
import torch

from trainer import environment
from trainer.config import ConfigError, Precision
from trainer.precision import StaticScale, amp_dtype, grad_scaler


@pytest.mark.parametrize(
    ("amx", "avx512", "vendor", "expected"),
    [
        (True, True, "GenuineIntel", torch.bfloat16),
        (False, True, "AuthenticAMD", torch.bfloat16),
        (False, True, "GenuineIntel", None),
        (False, False, "AuthenticAMD", None),
        (False, False, "", None),
    ],
)
def test_a_cpu_autocasts_where_bf16_is_faster(
    amx: bool, avx512: bool, vendor: str, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(environment, "processor", lambda: {"vendor_id": vendor})
    assert amp_dtype(Precision(), torch.device("cpu")) is expected
    assert amp_dtype(Precision(amp="bf16"), torch.device("cpu")) is torch.bfloat16


def test_a_static_scale_is_fp16s_alone() -> None:
    gpu, options = torch.device("cuda"), Precision(static_scale=True, loss_scale=128.0)
    scaler = grad_scaler(options, torch.float16, gpu)
    assert isinstance(scaler, StaticScale) and scaler.scale(torch.tensor(2.0)) == 256 and not scaler.is_enabled()
    assert not isinstance(grad_scaler(options, torch.bfloat16, gpu), StaticScale)  # amp=auto on a younger GPU
    with pytest.raises(ConfigError, match=r"precision\.static_scale=true is fp16's, and precision\.amp=bf16"):
        Precision(amp="bf16", static_scale=True)


def test_a_static_scale_is_gone_from_the_gradients_and_the_weights_get_none_of_it() -> None:
    weight, idle = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight, idle], lr=1.0), StaticScale(1024.0)
    scaler.scale((weight**2).sum()).backward()
    scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [2.0, 4.0] and idle.grad is None
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [-1.0, -2.0] and scaler.state_dict() == {}
