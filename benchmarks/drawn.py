"""JPEG files as large as ImageNet's, for a machine that has no data: drawn, and gone with the run."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image


def draw(folder: Path, count: int) -> None:
    """JPEG files in 10 classes, of about 110 kB: smooth colours with as much noise as that takes at quality 92."""

    def one(number: int) -> None:
        random = np.random.default_rng(number)
        width, height = int(random.integers(400, 600)), int(random.integers(333, 500))
        y, x = np.mgrid[0:height, 0:width] / 100
        waves = np.stack([np.sin(x * f + p) + np.cos(y * g) for f, p, g in random.uniform(0.5, 6, (3, 3))], -1)
        pixels = np.clip(128 + 50 * waves + random.normal(0, 14, (height, width, 3)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=92)
        place = folder / "train" / f"class{number % 10}" / f"{number:05}.JPEG"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.getvalue())

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(one, range(count)))
