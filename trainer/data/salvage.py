"""What becomes of an image that the decoder refuses: Pillow decodes it, or it stops the run or is left out, aloud."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from trainer.config import Data
from trainer.data.jpeg import measure
from trainer.data.table import DataError, Index


class UndecodableError(DataError):
    """An image that cannot be decoded, met in mid-run by one rank."""

    everywhere = False


class Salvage:
    """The images of one index that have been refused so far.

    One that Pillow can decode goes on as a lossless copy in memory. Any other is bad: `data.on_error=stop` ends the run
    with its name; with `skip` it is counted, evaluation goes without it, and in training the next sound row takes its
    place: a function of the data alone, so that batches keep their size and any number of ranks sees the same.
    """

    def __init__(self, data: Data, index: Index) -> None:
        self._data, self._index = data, index
        self.bad: dict[int, str] = {}  # row: what is wrong with it
        self.converted: dict[int, np.ndarray] = {}  # row: bytes of the copy, or of the path that it can be read from
        self._files: list[int] = []  # descriptors, open for as long as their paths are in use

    def replaced(self, rows: np.ndarray) -> np.ndarray:
        """`rows` with sound ones in the place of the bad."""
        if not self.bad:
            return rows
        rows = rows.copy()
        for place in np.flatnonzero(np.isin(rows, list(self.bad))):
            while int(rows[place]) in self.bad:
                rows[place] = (rows[place] + 1) % len(self._index)
        return rows

    def sound(self, rows: np.ndarray) -> np.ndarray:
        """`rows` without the bad."""
        return rows[~np.isin(rows, list(self.bad))] if self.bad else rows

    def take(self, row: int) -> None:
        """Deal with a row that the decoder refused; UndecodableError, naming it, if it ends the run."""
        try:
            with Image.open(io.BytesIO(self._read(row))) as image:
                pixels = image.convert("RGB")
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error and more on broken files
            self._give_up(row, error)
            return
        copy = io.BytesIO()
        pixels.save(copy, "BMP")
        if self._index.shard_files:
            self.converted[row] = np.frombuffer(copy.getvalue(), np.uint8)
            return
        self._files.append(os.memfd_create(f"row-{row}"))
        os.write(self._files[-1], copy.getvalue())
        self.converted[row] = np.frombuffer(os.fsencode(f"/proc/{os.getpid()}/fd/{self._files[-1]}"), np.uint8)

    def learn(self, bad: dict[int, str]) -> None:
        """Take over what other ranks found to be bad; UndecodableError if it is too much by now."""
        self.bad |= bad
        self._demand_few()

    def demand_unchanged(self, rows: np.ndarray) -> None:
        """DataError, naming the first of `rows` whose image no longer has the size that the index has of it."""
        index = self._index
        for row in rows.tolist():
            width, height, _ = measure(io.BytesIO(self._read(row)))
            if (width, height) != (index.widths[row], index.heights[row]):
                raise DataError(
                    f"{index.path(row)} is {width} x {height} pixels, but {index.widths[row]} x {index.heights[row]} "
                    f"in the index of {index.root}: it was overwritten; delete the index file there, and run again"
                )

    def _read(self, row: int) -> bytes:
        if self._index.shard_files:
            return self._index.encoded(np.array([row]))[0].tobytes()
        return Path(self._index.path(row)).read_bytes()

    def _give_up(self, row: int, error: Exception) -> None:
        index = self._index
        if isinstance(error, OSError) and error.errno:
            reason = f"cannot be read ({error.strerror})"
        else:
            reason = "cannot be decoded: it is damaged or not an image"
        place = f"{index.path(row)} (row {row}, class {index.classes[index.labels[row]]})"
        if self._data.on_error == "stop":
            raise UndecodableError(
                f"{place} {reason}: put a sound copy in its place, or set data.on_error=skip, then run again"
            )
        self.bad[row] = f"{place} {reason}"
        self._demand_few()

    def _demand_few(self) -> None:
        most = self._data.max_skipped * len(self._index)
        if len(self.bad) > most:
            raise UndecodableError(
                f"{len(self.bad)} of {len(self._index)} images of {self._index.root} cannot be decoded, more than "
                f"data.max_skipped={self._data.max_skipped:g} of them: {next(iter(self.bad.values()))}"
            )
