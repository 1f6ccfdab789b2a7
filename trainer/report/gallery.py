"""Pictures of a run: the training images as the network sees them, and the evaluation images it gets most wrong."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer.config import Data
from trainer.confusion import Findings
from trainer.data.table import Index
from trainer.report.folder import RunFolder

SIDE = 128  # pixels; of a mistake the short one, of an example the long one
COLUMNS, ROWS = 8, 4  # of examples
CONFUSIONS = 20


def write_examples(path: Path, images: torch.Tensor, data: Data) -> None:
    """One JPEG of all `images`, as the network gets them: float (n, 3, size, size), normalised by `data`; OSError."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (data.mean, data.std))
    levels = (images.detach().cpu().float() * std + mean).clamp(0, 1).mul(255).round().byte()
    side = min(SIDE, images.shape[-1])
    sheet = Image.new("RGB", (COLUMNS * side, -(-len(levels) // COLUMNS) * side))
    for number, pixels in enumerate(levels.permute(0, 2, 3, 1).numpy()):
        place = number % COLUMNS * side, number // COLUMNS * side
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR), place)
    sheet.save(path, quality=90)


def write_evaluation(folder: RunFolder, record: dict[str, Any], index: Index, found: Findings) -> None:
    """Write evaluation.json, and the pictures that it names in the place of those of the evaluation before.

    Args:
        record: of metrics.jsonl.
    """
    mistakes = []
    for number, mistake in enumerate(found.mistakes):
        picture = f"mistakes/{record['step']:09}-{number:02}.jpg"
        if _write_picture(folder.path / picture, index, mistake.row):
            mistakes.append(
                {
                    "file": str(Path(index.path(mistake.row)).relative_to(index.root)),
                    "actual": _name(index, mistake.actual),
                    "predicted": _name(index, mistake.predicted),
                    "probability": round(mistake.probability, 6),
                    "picture": picture,
                }
            )
    counts, right = found.counts.tolist(), found.right.tolist()
    content = {
        "step": record["step"],
        "epoch": record["epoch"],
        "top1": record["top1"],
        "classes": list(index.classes),
        "per_class": [
            {"name": name, "count": count, "top1": round(100 * hits / count, 4) if count else None}
            for name, count, hits in zip(index.classes, counts, right)
        ],
        "confusions": [
            {"actual": _name(index, actual), "predicted": _name(index, predicted), "count": count}
            for actual, predicted, count in found.pairs[:CONFUSIONS]
        ],
        "mistakes": mistakes,
    }
    folder.try_to_write("evaluation.json", content)
    with contextlib.suppress(OSError):
        for old in (folder.path / "mistakes").glob("*.jpg"):
            if not old.name.startswith(f"{record['step']:09}-"):
                old.unlink()


def _name(index: Index, label: int) -> str:
    """Of a class; the network may have more than the data."""
    return index.classes[label] if label < len(index.classes) else f"class {label}"


def _write_picture(path: Path, index: Index, row: int) -> bool:
    """A small JPEG of a row of the index; False where it cannot be read or written."""
    try:
        source = io.BytesIO(index.encoded(np.array([row]))[0]) if index.shard_files else index.path(row)
        with Image.open(source) as image:
            image.draft("RGB", (SIDE, SIDE))  # JPEG: decoded at a fraction of its size
            image = image.convert("RGB")
        scale = SIDE / min(image.size)
        image = image.resize([max(1, round(scale * side)) for side in image.size], Image.Resampling.BILINEAR)
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=85)
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, struct.error and more on broken files
        return False
    return True
