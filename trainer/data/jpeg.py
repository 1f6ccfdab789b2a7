"""Width and height of an image file from its header, and whether the file is whole, almost never decoding it.

A JPEG costs two small reads: the frame header at the front and the end-of-image marker at the back. Everything unusual
is put to Pillow, which may decode the file. Nothing here imports the rest of the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

HEAD = 8192  # covers the frame header of most photographs; those behind a long EXIF block cost one more read
TAIL = 4096
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive: all that libjpeg and nvJPEG share
_BARE = frozenset((0x01, *range(0xD0, 0xD8)))  # markers without a length
_NO_HEADER = frozenset((0xD9, 0xDA))  # the picture ends or its data begin before any frame header
# What DALI decodes (tried with 2.4 on the CPU); Pillow's "MPO" is a JPEG with further pictures behind it.
_DECODABLE = frozenset(("JPEG", "MPO", "PNG", "BMP", "TIFF", "PPM", "JPEG2000", "WEBP"))


class BadImage(ValueError):
    """A file that cannot be trained on; the text says what is wrong with it, without its name."""


def measure_all(root: Path, names: list[str]) -> tuple[list[tuple[int, int, int]], list[tuple[str, str]]]:
    """`measure` of each file root/name; zeros for a bad one, and (name, what is wrong) of all bad ones."""
    rows, bad = [], []
    for name in names:
        row = (0, 0, 0)
        try:
            with open(f"{root}/{name}", "rb", buffering=0) as file:
                row = measure(file)
        except BadImage as error:
            bad.append((name, str(error)))
        except OSError as error:
            bad.append((name, f"cannot be read ({error.strerror})"))
        rows.append(row)
    return rows, bad


def measure(file: BinaryIO) -> tuple[int, int, int]:
    """(width, height, bytes) of an open image file, pixels as stored: an EXIF orientation is ignored, as in training.

    `file` is seekable and binary, best unbuffered. Raises BadImage for what is empty, cut short, no image, or a kind
    that DALI cannot decode; OSError where it cannot be read.
    """
    size = file.seek(0, 2)
    if size == 0:
        raise BadImage("is empty (0 bytes)")
    file.seek(0)
    head = file.read(HEAD)
    header = jpeg_header(file, head) if head[:2] == b"\xff\xd8" else None
    if header is None:
        return *_ask_pillow(file, size), size
    width, height, behind = header
    # The header may hold a thumbnail with an end marker of its own, so the search never reaches back into it.
    if not _ends_with(file, size, b"\xff\xd9", behind):
        file.seek(behind)
        if b"\xff\xd9" not in file.read():  # Pillow may forgive it, DALI's libjpeg-turbo does not
            raise BadImage("is cut short (it has no end marker)")
        _ask_pillow(file, size)
    return width, height, size


def jpeg_header(file: BinaryIO, head: bytes) -> tuple[int, int, int] | None:
    """(width, height, offset behind the frame header) of a JPEG beginning with `head`; None: leave it to a decoder."""
    at, start, block = 2, 0, head
    while True:
        if at + 9 > start + len(block):
            file.seek(at)
            start, block = at, file.read(HEAD)
            if len(block) < 9:
                return None
        here = at - start
        marker = block[here + 1]
        if block[here] != 0xFF or marker in _NO_HEADER:
            return None
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _BARE:
            at += 2
        elif marker in _FRAMES:
            height = int.from_bytes(block[here + 5 : here + 7], "big")
            width = int.from_bytes(block[here + 7 : here + 9], "big")
            # A height of 0 is told only after the first scan; 12 bits a sample is beyond most decoders.
            return (width, height, at + 9) if block[here + 4] == 8 and width and height else None
        else:
            at += 2 + int.from_bytes(block[here + 2 : here + 4], "big")


def _ends_with(file: BinaryIO, size: int, marker: bytes, behind: int = 0) -> bool:
    file.seek(max(size - TAIL, behind))
    return marker in file.read(TAIL)


def _ask_pillow(file: BinaryIO, size: int) -> tuple[int, int]:
    """(width, height) of a file of any kind, decoded whole unless it is a PNG with its end chunk."""
    whole = _ends_with(file, size, b"IEND")  # asked first: Pillow relies on the position it left the file at
    file.seek(0)
    try:
        with Image.open(file) as image:
            if image.format not in _DECODABLE:
                raise BadImage(f"is a {image.format}, which DALI cannot decode (convert it to JPEG or PNG)")
            if image.format != "PNG" or not whole:
                image.load()
            return image.size
    except UnidentifiedImageError:
        raise BadImage("is not an image") from None
    except BadImage:
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, struct.error and more on broken files
        raise BadImage(f"cannot be decoded ({' '.join(str(error).split())})") from None
