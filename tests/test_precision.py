"""Number formats that a processor is faster at."""

from __future__ import annotations

import pytest
import torch

from trainer import environment
from trainer.config import Precision
from trainer.precision import amp_dtype


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
