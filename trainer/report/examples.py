"""The first training images of a run on their way to the network: a copy on the device, a picture after the step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from trainer.config import Data
from trainer.data.feeds import Batch
from trainer.report import gallery


class Examples:
    """Takes a copy of the first batch that passes, unless `path` is there already."""

    def __init__(self, path: Path, data: Data) -> None:
        self._path, self._data = path, data
        self._wanted = not path.exists()
        self._images: torch.Tensor | None = None

    def passing(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """`batches`, unchanged."""
        for batch in batches:
            if self._wanted:
                self._wanted = False
                self._images = batch[0][: gallery.COLUMNS * gallery.ROWS].clone()
            yield batch

    def write(self) -> None:
        """Write the picture, once; waits for the device. A picture that cannot be written is gone without."""
        images, self._images = self._images, None
        if images is not None:
            try:
                gallery.write_examples(self._path, images, self._data)
            except OSError:
                self._path.unlink(missing_ok=True)
