"""What is read off the main rank's device when a record is written: never in a step, and without waiting for it."""

from __future__ import annotations

from typing import Any

import torch

from trainer.config import Config
from trainer.data.feeds import image_size
from trainer.distributed import World
from trainer.models import build, summary
from trainer.plan import Plan
from trainer.precision import amp_dtype

# Dense peaks in 10^12 operations a second, (bf16 or fp16, TF32, fp32), from NVIDIA's data sheets of these names; where
# a sheet gives the rate with 2:4 sparsity, half of it. The first whose words are all in the device's name counts.
PEAKS = {
    "H200 NVL": (835, 418, 60),
    "H200": (989, 494, 67),
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 418, 60),
    "H100": (989, 494, 67),
    "A100": (312, 156, 19.5),
}
FORWARD_AND_BACKWARD = 3  # the backward pass has twice the products of the forward pass: those of both its gradients


def peak(device_name: str, dtype: torch.dtype | None, tf32: bool) -> float | None:
    """Operations a second that the device could do at best, None for one that is not in the table."""
    for words, (half, tensor, single) in PEAKS.items():
        if set(words.split()) <= set(device_name.replace("-", " ").split()):
            return 1e12 * (half if dtype is not None else tensor if tf32 else single)
    return None


class Gauges:
    """MFU, memory and utilisation of the main rank's device; each None where it is not known."""

    def __init__(self, config: Config, plan: Plan, here: World, classes: int) -> None:
        self._config, self._plan, self._device, self._classes = config, plan, here.device, classes
        self._peak = peak(here.device_name, amp_dtype(config.precision, here.device), config.precision.tf32)
        self._macs: dict[int, int] = {}
        self._utilisation = here.device.type == "cuda"

    def read(self, step: int, images_per_second: float | None) -> dict[str, Any]:
        """mfu (0 to 1), max_memory_gb (10^9 bytes, since the start), gpu_utilisation (percent, of the last second)."""
        memory = torch.cuda.max_memory_allocated(self._device) / 1e9 if self._device.type == "cuda" else None
        return {
            "mfu": self._mfu(step, images_per_second),
            "max_memory_gb": memory and round(memory, 3),
            "gpu_utilisation": self._read_utilisation(),
        }

    def _mfu(self, step: int, images_per_second: float | None) -> float | None:
        """Operations that the network asks for, over those that the devices could have done in that time.

        An operation is half a multiply-accumulate, of convolutions and linear layers alone; what a teacher or SAM
        computes besides is not counted.
        """
        if self._peak is None or images_per_second is None:
            return None
        side = image_size(self._config.data, self._plan, max(step - 1, 0))
        if side not in self._macs:
            with torch.device("meta"):
                model = build.create(self._config.model, self._config.model.num_classes or self._classes)
                self._macs[side] = summary.count_macs(model, side)
        operations = 2 * FORWARD_AND_BACKWARD * self._macs[side] * images_per_second
        return round(operations / (self._plan.ranks * self._peak), 4)

    def _read_utilisation(self) -> int | None:
        """NVML's; None from the first time on that it cannot be asked (it needs the package nvidia-ml-py)."""
        if not self._utilisation:
            return None
        try:
            return torch.cuda.utilization(self._device)
        except Exception:  # pynvml's own errors are no class of ours to name
            self._utilisation = False
            return None
