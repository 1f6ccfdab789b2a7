"""A copy of nested state in host memory, taken at a step boundary so that training may go on while it is written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

Place = Callable[[tuple[Any, ...], torch.Tensor], torch.Tensor]


class Snapshot:
    """Copies tensors into buffers that it keeps from one time to the next: fresh memory costs more than the copy.

    A copy is begun by `take` and ended by `complete`, from another thread. Of a GPU's tensors `take` only queues the
    copies, into pinned memory. On a CPU copying 205 MB takes 37 ms at memory speed, so that tensors which stay the same
    until the next update of the weights are left to `complete`: whoever makes that update waits by `settle` first.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}
        self._queued: torch.cuda.Event | None = None
        self._later: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._settled = threading.Event()
        self._settled.set()

    def reserve(self, state: Any) -> None:
        """Make the buffers for tensors like those of `state`, and touch their pages. Reads shapes, not values."""

        def touch(path: tuple[Any, ...], tensor: torch.Tensor) -> torch.Tensor:
            return self._buffer(path, tensor).zero_()

        _walk(state, touch)

    def take(self, state: Any, still: frozenset[int] = frozenset()) -> Any:
        """`state` with every tensor copied, once `complete` is done, and valid until the next `take`.

        Args:
            still: `data_ptr()` of the tensors that stay the same until `settle`.
        """
        on_device = False

        def copy(path: tuple[Any, ...], tensor: torch.Tensor) -> torch.Tensor:
            nonlocal on_device
            buffer = self._buffer(path, tensor)
            if not tensor.is_cuda and tensor.data_ptr() in still:
                self._later.append((buffer, tensor.detach()))
                return buffer
            on_device = on_device or tensor.is_cuda
            return buffer.copy_(tensor, non_blocking=True)

        with torch.no_grad():
            copied = _walk(state, copy)
        if on_device:
            self._queued = torch.cuda.Event()
            self._queued.record()
        self._settled.clear()
        return copied

    def complete(self) -> None:
        """Make and await the copies that `take` has left; once is enough."""
        try:
            while self._later:
                buffer, tensor = self._later.pop()
                buffer.copy_(tensor)
        finally:
            self._settled.set()
        if self._queued is not None:
            self._queued.synchronize()

    def settle(self) -> None:
        """Return when no copy reads the memory of the state any more, but for copies that a GPU's queue orders."""
        self._settled.wait()

    def _buffer(self, path: tuple[Any, ...], tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(path)
        if (
            buffer is None
            or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype)
            or buffer.is_pinned() != tensor.is_cuda
        ):
            # empty_like keeps channels-last: a checkpoint stores the strides too.
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            self._buffers[path] = buffer
        return buffer


def owned(state: Any) -> Any:
    """`state` with every tensor in memory of its own."""
    return _walk(state, lambda path, tensor: tensor.clone())


def _walk(tree: Any, place: Place, path: tuple[Any, ...] = ()) -> Any:
    """`tree` of dictionaries, lists and tuples, each new, with what `place` makes of its tensors."""
    if isinstance(tree, torch.Tensor):
        return place(path, tree)
    if isinstance(tree, dict):
        return {key: _walk(value, place, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_walk(value, place, (*path, number)) for number, value in enumerate(tree)])
    return tree
