"""The bytes of one image on their way: as they are, as a smaller copy, or put right."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from trainer.data.index import DataError
from trainer.data.jpeg import HEAD, BadImage, jpeg_header, measure

QUALITY = 90  # of smaller copies, 4:2:0; ffcv's ImageNet copies use 90 too
_JPEG_SUFFIXES = (".jpg", ".jpeg")


@dataclass(frozen=True)
class Encoding:
    """What becomes of the images: nothing where all are None.

    `max_side` and `short_side` are pixels; nothing is enlarged. Every image is coded anew then, in its stored
    orientation (the EXIF tag goes, the pixels stay as training on the original sees them), grey as grey, all else as
    RGB.
    """

    max_side: int | None = None
    short_side: int | None = None
    quality: int | None = None

    def check(self) -> None:
        """DataError for what cannot be meant."""
        if self.max_side is not None and self.short_side is not None:
            raise DataError(f"--max-side {self.max_side} and --short-side {self.short_side}: give one of them")
        for flag, side in (("--max-side", self.max_side), ("--short-side", self.short_side)):
            if side is not None and side < 1:
                raise DataError(f"{flag} {side} is no size: give the pixels of a side, for example 256")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise DataError(
                f"--quality {self.quality} is outside 1 .. 100: JPEG copies of ImageNet use about {QUALITY}"
            )

    @property
    def passes_through(self) -> bool:
        return self == Encoding()


class Converted(NamedTuple):
    """An image as it is written. `oddity`: what was put right, in words, or None."""

    name: str
    data: bytes
    oddity: str | None


def convert(name: str, data: bytes, encoding: Encoding) -> Converted:
    """One image by `encoding`; BadImage where it cannot be decoded (passing through: where its header shows it)."""
    if encoding.passes_through:
        measure(io.BytesIO(data))
        oddity = _oddity(name, data)
        if oddity is None:
            return Converted(name, data, None)
        return Converted(name, _encode(data, Encoding(), 100, "4:4:4"), f"{oddity}, now a JPEG (quality 100, 4:4:4)")
    coded = _encode(data, encoding, encoding.quality or QUALITY, "4:2:0")
    oddity = _oddity(name, data)
    renamed = name if name.lower().endswith(_JPEG_SUFFIXES) else name + ".JPEG"
    return Converted(renamed, coded, oddity and f"{oddity}, now a JPEG like the others")


def suffix_of(name: str, data: bytes) -> str:
    """jpg, png, ... by content where that is told at once, else by name: a WebDataset decodes by it."""
    if data[:2] == b"\xff\xd8":
        return "jpg"
    return "png" if data[:4] == b"\x89PNG" else os.path.splitext(name)[1].lower().lstrip(".")


def components(data: bytes) -> int | None:
    """The number of colour components of a JPEG; None where the header is unusual or it is none."""
    header = jpeg_header(io.BytesIO(data), data[:HEAD]) if data[:2] == b"\xff\xd8" else None
    return data[header[2]] if header and header[2] < len(data) else None


def _oddity(name: str, data: bytes) -> str | None:
    """What of ILSVRC's known oddities an image is, by its content."""
    if components(data) == 4:
        return "was a CMYK JPEG"
    if data[:2] != b"\xff\xd8" and name.lower().endswith(_JPEG_SUFFIXES):
        kind = "PNG" if data[:4] == b"\x89PNG" else "other format"
        return f"was a {kind} called {os.path.splitext(name)[1]}"
    return None


def _encode(data: bytes, encoding: Encoding, quality: int, subsampling: str) -> bytes:
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")  # about broken metadata, which is dropped
            size = _target(image.size, encoding)
            if size != image.size:
                # Decoded at half, a quarter, ... of the size while that is twice the goal, as Image.thumbnail does.
                image.draft(None, (2 * size[0], 2 * size[1]))
            picture = image if image.mode == "L" else image.convert("RGB")
            picture = picture if picture.size == size else picture.resize(size, Image.LANCZOS)
            coded = io.BytesIO()
            picture.save(coded, "JPEG", quality=quality, subsampling=subsampling, exif=b"", icc_profile=None)
            return coded.getvalue()
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error and more on broken files
        raise BadImage(f"cannot be decoded ({' '.join(str(error).split())})") from None


def _target(size: tuple[int, int], encoding: Encoding) -> tuple[int, int]:
    side = max(size) if encoding.max_side is not None else min(size)
    goal = encoding.max_side if encoding.max_side is not None else encoding.short_side
    if goal is None or side <= goal:
        return size
    return max(1, round(size[0] * goal / side)), max(1, round(size[1] * goal / side))
