"""Pictures with a line of text below each, in one picture."""

from __future__ import annotations

import math
import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from trainer.config import ConfigError

TILE = 192  # pixels, width and height of a picture
_LINE = 20  # pixels, height of its text
_MOST = 400  # pictures: 20 x 20 tiles


def draw_grid(path: str, pictures: list[tuple[str, str]]) -> None:
    """Draw files and their texts into the picture file `path`, as nearly square as it goes.

    ConfigError for more than 400 pictures, and where the file cannot be written.
    """
    if len(pictures) > _MOST:
        raise ConfigError(f"--grid {path} draws {_MOST} images at most, and here are {len(pictures)}: name fewer")
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + _LINE)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (file, text) in enumerate(pictures):
        x, y = number % columns * TILE, number // columns * (TILE + _LINE)
        with Image.open(file) as image:
            tile = ImageOps.contain(image.convert("RGB"), (TILE - 4, TILE - 4))
        sheet.paste(tile, (x + (TILE - tile.width) // 2, y + (TILE - tile.height) // 2))
        while pen.textlength(text, font) > TILE - 8 and len(text) > 1:
            head, _, share = text.rpartition(" ")
            text = f"{head.rstrip('…')[:-1]}… {share}" if len(head) > 1 else text[:-1]
        pen.text((x + 4, y + TILE), text, "black", font)
    aside = Path(path).with_name(f".{os.getpid()}-{Path(path).name}")
    try:
        sheet.save(aside)
        os.replace(aside, path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--grid {path} cannot be written ({reason}): give a .png in a folder that exists") from None
    finally:
        aside.unlink(missing_ok=True)
