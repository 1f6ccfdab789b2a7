"""What W&B shows beside curves, from the files of a run folder: pictures, tables, the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def examples(folder: Path) -> dict[str, Any]:
    """The training images as the network sees them, once a run."""
    import wandb

    path = folder / "examples.jpg"
    return {"train/examples": wandb.Image(str(path))} if path.exists() else {}


def tables(folder: Path, step: int) -> dict[str, Any]:
    """The tables of the evaluation after `step`, if evaluation.json is of it: accuracy by class, mistakes."""
    import wandb

    try:
        found = json.loads((folder / "evaluation.json").read_text())
    except (OSError, ValueError):
        return {}
    if found["step"] != step:  # another has taken its place
        return {}
    classes = [[one["name"], one["count"], one["top1"]] for one in found["per_class"]]
    mistakes = []
    for one in found["mistakes"]:
        picture = folder / one["picture"]
        if picture.exists():
            row = [wandb.Image(str(picture)), one["actual"], one["predicted"], one["probability"], one["file"]]
            mistakes.append(row)
    result = {"eval/classes": wandb.Table(columns=["class", "images", "top1"], data=classes)}
    if mistakes:
        columns = ["picture", "actual", "predicted", "probability", "file"]
        result["eval/mistakes"] = wandb.Table(columns=columns, data=mistakes)
    return result


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the best evaluation, None where none is kept."""
    found = []
    for path in (folder / "checkpoints").glob("[0-9]*/manifest.json"):
        top1 = json.loads(path.read_text()).get("top1")
        if top1 is not None:
            found.append((top1, path.parent))
    return max(found)[1] if found else None
