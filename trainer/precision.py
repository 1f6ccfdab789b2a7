"""Number formats: which autocast, which loss scaling, which kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from trainer import environment
from trainer.config import Config, ConfigError, Precision, RunError


def amp_dtype(options: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype to autocast to, None for fp32. `auto`: bf16 where the hardware multiplies it, else fp16 on a GPU."""
    if options.amp == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        return torch.bfloat16 if _cpu_multiplies_bf16() else None
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[options.amp]
    if dtype is torch.float16 and device.type == "cpu":
        raise ConfigError("precision.amp=fp16 needs a GPU: use precision.amp=auto, bf16 or fp32 on a CPU")
    return dtype


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager:
    """A context for forward passes; reusable."""
    return torch.autocast(device.type, dtype=dtype) if dtype is not None else nullcontext()


class StaticScale:
    """A factor on the loss that stays, with what the loop needs of torch.amp.GradScaler's interface.

    Gradients are not judged: one that overflows is a non-finite gradient like any other (`loop.on_nonfinite`). So a
    step waits for nothing, and can be recorded as a graph.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self._factor

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the factor."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, 1 / self._factor)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def update(self) -> None:
        """Nothing: it stays."""

    def is_enabled(self) -> bool:
        """Whether steps are judged."""
        return False

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing: the config has it."""


def grad_scaler(
    options: Precision, dtype: torch.dtype | None, device: torch.device
) -> torch.amp.GradScaler | StaticScale:
    """A loss scaler, which does nothing unless the dtype is fp16: bf16 has the range of fp32."""
    if dtype is torch.float16 and options.static_scale:
        return StaticScale(options.loss_scale)
    return torch.amp.GradScaler(device.type, init_scale=options.loss_scale, enabled=dtype is torch.float16)


def set_kernels(config: Config, device: torch.device) -> None:
    """Process-wide choices of kernels: TF32, cuDNN's autotuner, determinism, where compiled ones are kept.

    Raises ConfigError for a folder that precision.compile_cache names and that cannot be written to.
    """
    if config.precision.compile or config.precision.fused:
        environment.keep_compiled(config.precision.compile_cache)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.precision.tf32
        torch.backends.cudnn.allow_tf32 = config.precision.tf32
        torch.backends.cudnn.benchmark = not config.deterministic
        if config.deterministic:
            environment.make_cublas_deterministic()
    torch.use_deterministic_algorithms(config.deterministic)


@contextmanager
def naming_what_cannot_compile(options: Precision) -> Iterator[None]:
    """Turns what torch.compile's own code raises into a RunError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        first = str(error).strip().partition("\n")[0]
        kept = environment.compiled_folder(options.compile_cache)
        raise RunError(
            f"torch.compile has failed ({first}): if {kept} has been damaged, remove it; otherwise set "
            "precision.compile=false"
        ) from error


def _cpu_multiplies_bf16() -> bool:
    """Whether this processor multiplies bf16 faster than fp32.

    AMX does, and so does AMD's AVX-512 (Zen 4: 419 against 196 GFLOP/s of two cores). Intel's AVX-512 has the
    instructions too, but takes twice as long by them (165 against 329): that is what is left where a hypervisor
    hides AMX. On a processor without either, bf16 is emulated, many times slower than fp32.
    """
    amx, avx512 = (getattr(torch.cpu, name, bool)() for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return amx or (avx512 and environment.processor().get("vendor_id") == "AuthenticAMD")
