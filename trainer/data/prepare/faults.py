"""What can be wrong with an image file, or is worth knowing of it, by its header or by all its pixels."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image

from trainer.data.jpeg import HEAD, TAIL, BadImage, jpeg_header, measure

GIANT = 20_000_000  # pixels
_ORIENTATION = 0x0112  # the EXIF tag


def marks(file: BinaryIO) -> bytes:
    """What equal files share: a hash of size, beginning and end; nothing where the file is empty."""
    size = file.seek(0, 2)
    file.seek(0)
    ends = file.read(HEAD)
    file.seek(max(0, size - TAIL))
    return hashlib.blake2b(b"%d " % size + ends + file.read(TAIL), digest_size=16).digest() if size else b""


def findings(file: BinaryIO, decode: bool) -> Iterator[tuple[str, str]]:
    """(kind, detail) of what is to be said of one image file; `decode`: all its pixels too."""
    file.seek(0)
    head = file.read(HEAD)
    if not head:
        yield "zero-byte", ""
        return
    is_jpeg = head[:2] == b"\xff\xd8"
    try:
        width, height, _ = measure(file)
    except BadImage as error:
        yield _bad_kind(file, is_jpeg, str(error)), str(error)
        return
    if decode and (problem := _decoded(file)):
        yield "undecodable", problem
        return
    if width * height > GIANT:
        yield "giant", f"{width} x {height}"
    if not is_jpeg:
        yield "not a JPEG", _format(file)
        return
    header = jpeg_header(file, head)
    if header:
        file.seek(header[2])
        parts = file.read(1)[0]
        if parts in (1, 4):
            yield "grey" if parts == 1 else "CMYK", ""
    if b"Exif\0" in head and (turn := _orientation(file)) > 1:
        yield "EXIF-rotated", f"orientation {turn}, ignored in training"


def _bad_kind(file: BinaryIO, is_jpeg: bool, text: str) -> str:
    if is_jpeg:
        file.seek(0)
        return "undecodable" if b"\xff\xd9" in file.read()[-TAIL:] else "truncated"
    if "truncated" in text:
        return "truncated"
    return "not an image" if text == "is not an image" else "undecodable"


def _decoded(file: BinaryIO) -> str:
    """What keeps Pillow from decoding all pixels; empty where nothing does."""
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata
            with Image.open(io.BytesIO(file.read())) as image:
                image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error and more on broken files
        return " ".join(str(error).split())
    return ""


def _format(file: BinaryIO) -> str:
    file.seek(0)
    with Image.open(file) as image:
        return str(image.format)


def _orientation(file: BinaryIO) -> int:
    """The EXIF orientation, 1 where it is upright or unreadable."""
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata: nobody reads it
        return 1
