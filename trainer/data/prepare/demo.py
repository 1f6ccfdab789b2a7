"""The demo set: a labelled set of JPEG photographs of nothing, drawn here, to try the whole trainer without a download.

Ten classes of shapes and patterns in an ImageFolder. Files are like ImageNet's in size, proportions and coding, so that
the real decoding path is met. Colours come from one distribution for all classes: only the form tells the class. An
image depends on (seed, split, class, number) alone; another release of numpy or Pillow may round a pixel differently.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from trainer.data.index import DataError, Progress
from trainer.data.prepare import run_jobs

RECIPE = 1  # rises when the same seed would draw other images
SPLITS = ("train", "val")
_STAMP = "demo.json"  # the parameters; there only in a complete set
_JOB = 20  # images a process draws between two reports
_README = """The demo set of imagenet-trainer: {classes} classes of drawn shapes and patterns as an ImageFolder.
{train} images of each class in train/, {val} in val/. Nothing in it was photographed or downloaded.
Made by trainer/data/prepare/demo.py, recipe {recipe}, seed {seed}. class_index.json: label, folder, words.
As in ImageNet a few files are grey, are progressive, keep the full chroma, or carry an EXIF orientation.
"""

Draw = np.random.Generator
# Motifs: polygons (count, corners, 2) in a plane whose unit is the short side and whose origin the picture's centre.


def _outline(radii: np.ndarray | float, corners: int) -> np.ndarray:
    """A closed outline (corners, 2) around the origin at the given radii, the corners at equal angles."""
    angle = np.arange(corners) * (2 * np.pi / corners)
    return np.stack([np.cos(angle), np.sin(angle)], -1) * np.broadcast_to(radii, corners)[:, None]


def _lattice(rng: Draw, step: float, *, shift: float = 0.0, jitter: float = 0.0) -> np.ndarray:
    """Points (count, 2) all over the plane at distance `step`, every other row shifted, each moved up to `jitter`."""
    reach = int(np.ceil(1.3 / step)) + 1
    column, row = np.meshgrid(np.arange(-reach, reach + 1.0), np.arange(-reach, reach + 1.0))
    points = np.stack([column + shift * (row % 2), row], -1).reshape(-1, 2) + rng.uniform(-0.5, 0.5, 2)
    return (points + rng.uniform(-jitter, jitter, points.shape)) * step


def _scatter(rng: Draw, outline: np.ndarray, steps: tuple[float, float] = (0.42, 0.66)) -> np.ndarray:
    """The outline again and again, each turned and sized at random, a few left out."""
    step = rng.uniform(*steps)
    centres = _lattice(rng, step, shift=rng.choice([0.0, 0.5]), jitter=0.1)
    centres = centres[rng.random(len(centres)) > 0.08]
    angle = rng.uniform(0, 2 * np.pi, len(centres))
    size = step * rng.uniform(0.37, 0.47, len(centres))
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(-1, 2, 2)
    return np.einsum("nij,kj->nki", turn * size[:, None, None], outline) + centres[:, None]


def _checkerboard(rng: Draw) -> np.ndarray:
    step = rng.uniform(0.14, 0.27)
    return _lattice(rng, step)[:, None] + _outline(step / 2, 4)  # diamonds that touch at their corners


def _cross(rng: Draw) -> np.ndarray:
    a = rng.uniform(0.26, 0.38)
    half = np.array([[a, -1], [a, -a], [1, -a], [1, a], [a, a], [a, 1]])
    return _scatter(rng, np.concatenate([half, -half]))


def _dots(rng: Draw) -> np.ndarray:
    step = rng.uniform(0.1, 0.17)
    return _lattice(rng, step, shift=rng.choice([0.0, 0.5]))[:, None] + _outline(step * rng.uniform(0.26, 0.38), 14)


def _ring(rng: Draw) -> np.ndarray:
    turn = _outline(1.0, 40)[[*range(40), 0]]
    return _scatter(rng, np.concatenate([turn, turn[::-1] * rng.uniform(0.5, 0.72)]))


def _spiral(rng: Draw) -> np.ndarray:
    turns, half = rng.uniform(2.2, 3.2), rng.uniform(0.2, 0.3)
    angle = np.linspace(0.6, 2 * np.pi * turns, 90)
    along = np.stack([np.cos(angle), np.sin(angle)], -1)
    radius, width = angle[:, None] / angle[-1], half / turns
    outline = np.concatenate([along * (radius + width), (along * np.maximum(radius - width, 0))[::-1]])
    return _scatter(rng, outline * [1, rng.choice([-1, 1])], (0.5, 0.85))


def _stripes(rng: Draw) -> np.ndarray:
    step = rng.uniform(0.11, 0.24)
    x = np.linspace(-1.4, 1.4, 30)
    wave = rng.uniform(0, 0.04) * np.sin(x * rng.uniform(2, 9) + rng.uniform(0, 6))
    half = step * rng.uniform(0.2, 0.3)
    band = np.concatenate([np.stack([x, wave - half], -1), np.stack([x, wave + half], -1)[::-1]])
    return band + np.stack([np.zeros(26), np.arange(-13, 13) * step + rng.uniform(0, step)], -1)[:, None]


# In the order of the labels: sorted, as every reader of an ImageFolder sorts.
MOTIFS: dict[str, Callable[[Draw], np.ndarray]] = {
    "checkerboard": _checkerboard,
    "cross": _cross,
    "disc": lambda rng: _scatter(rng, _outline(1.0, 40)),
    "dots": _dots,
    "ring": _ring,
    "spiral": _spiral,
    "square": lambda rng: _scatter(rng, _outline(1.1, 4)),
    "star": lambda rng: _scatter(rng, _outline(np.tile([1.12, rng.uniform(0.42, 0.52)], 5), 10)),
    "stripes": _stripes,
    "triangle": lambda rng: _scatter(rng, _outline(1.15, 3)),
}


def _random(*key: int) -> Draw:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _size(rng: Draw) -> tuple[int, int]:
    """(width, height) as in ImageNet: mostly 500 x 375 and its like, upright or lying, some small, a few large."""
    longer = [500, rng.integers(200, 500), rng.integers(500, 700), rng.integers(700, 1400)]
    long = int(rng.choice(longer, p=[0.66, 0.2, 0.125, 0.015]))
    short = round(long * rng.choice([0.75, 0.667, rng.uniform(0.6, 1.0), 1.0], p=[0.5, 0.2, 0.25, 0.05]))
    return (long, short) if rng.random() < 0.72 else (short, long)


def _colours(rng: Draw) -> np.ndarray:
    """Background and motif, float (2, 3) in 0..255: any two colours of clearly different brightness."""
    while True:
        colours = rng.uniform(25, 245, (2, 3))
        grey = colours @ [0.299, 0.587, 0.114]
        colours = grey[:, None] + (colours - grey[:, None]) * rng.uniform(0.2, 0.95)
        if 60 < abs(grey[0] - grey[1]) < 150:
            return np.clip(colours, 0, 255)


def _surface(rng: Draw, size: tuple[int, int], colour: np.ndarray) -> Image.Image:
    """A surface of about one colour: soft changes of tone over the whole, and a mottling of random fineness."""
    tones = _image(colour + rng.normal(0, 16, (3, 3, 3)), size)
    cells = int(rng.integers(8, 90))
    mottle = rng.normal(0, rng.uniform(3, 13), (cells, cells, 1)) + rng.normal(0, 3, (cells, cells, 3))
    return ImageChops.add(tones, _image(128 + mottle, size), 1, -128)


def _image(values: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).resize(size, Image.BICUBIC)


def _clutter(rng: Draw, canvas: Image.Image, count: int, colours: np.ndarray) -> None:
    """Stones and threads in colours near those of the picture, drawn over it in place."""
    draw, unit = ImageDraw.Draw(canvas), min(canvas.size)
    for _ in range(count):
        fill = tuple(int(c) for c in np.clip(colours[rng.integers(2)] + rng.normal(0, 40, 3), 0, 255))
        centre = rng.uniform(0, canvas.size)
        if rng.random() < 0.4:
            bends = rng.normal(0, 0.06, 2) + rng.normal(0, 0.015, (8, 2))
            thread = centre + np.cumsum(bends, 0) * unit
            draw.line(thread.ravel().tolist(), fill=fill, width=max(1, round(unit * rng.uniform(0.003, 0.014))))
        else:
            stone = _outline(rng.uniform(0.6, 1.4, 7) * unit * rng.uniform(0.015, 0.06), 7) + centre
            draw.polygon(stone.ravel().tolist(), fill=fill)


def _mask(rng: Draw, polygons: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The motif seen under a random angle, 255 inside, smooth at the edges ("L" of the given size)."""
    angle, unit = rng.uniform(0, 2 * np.pi), 2 * min(size)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    skew = np.array([[1, rng.uniform(-0.1, 0.1)], [0, rng.uniform(0.85, 1.15)]])
    points = polygons @ (turn @ skew).T * unit + size  # the picture is drawn twice as large, its centre at `size`
    seen = ((points.max(1) > 0) & (points.min(1) < 2 * np.array(size))).all(1)
    mask = Image.new("L", (2 * size[0], 2 * size[1]))
    draw = ImageDraw.Draw(mask)
    for polygon in points[seen].reshape(int(seen.sum()), -1).tolist():
        draw.polygon(polygon, fill=255)
    return mask.reduce(2)


def draw_image(seed: int, split: int, label: int, number: int) -> Image.Image:
    """One picture of motif `label`, RGB. `split` counts in SPLITS, `label` in MOTIFS."""
    rng = _random(seed, split, label, number, 0)
    full, colours, sharpness = _size(rng), _colours(rng), rng.uniform(0.5, 0.85)
    size = (round(full[0] * sharpness), round(full[1] * sharpness))  # drawn smaller: soft as a photograph, and fast
    small = (size[0] // 3 + 1, size[1] // 3 + 1)  # surfaces, light and shadow are softer yet
    mask = _mask(rng, list(MOTIFS.values())[label](rng), size)
    shift = (rng.uniform(-0.02, 0.02, 2) * min(small)).round().astype(int).tolist()
    shadow = Image.new("L", small)
    shadow.paste(mask.resize(small, Image.BOX), shift)
    shadow = shadow.point([255 - v * 2 // 5 for v in range(256)]).convert("RGB")
    light = _image(rng.uniform(140, 255, (3, 3)), small).convert("RGB")
    lit = [ImageChops.multiply(_surface(rng, small, colour), light) for colour in colours]
    ground, motif = (s.resize(size, Image.BILINEAR) for s in (ImageChops.multiply(lit[0], shadow), lit[1]))
    _clutter(rng, ground, int(rng.integers(3, 12)), colours)
    picture = Image.composite(motif, ground, mask)
    _clutter(rng, picture, int(rng.integers(0, 5)), colours)
    picture = picture.resize(full, Image.BICUBIC)
    if rng.random() < 0.5:
        grain = rng.integers(0, rng.integers(3, 9), (full[1], full[0]), np.uint8)
        picture = ImageChops.add(picture, Image.fromarray(grain).convert("RGB"), 1, -(int(grain.max()) // 2))
    return picture


def _save(picture: Image.Image, path: Path, rng: Draw, tagged: bool) -> None:
    """Write a JPEG as ImageNet's are: some grey, some progressive, some with full chroma, a few with a rotation tag."""
    exif = Image.Exif()
    if tagged:
        exif[0x0112] = int(rng.choice([3, 6, 8]))
    grey, full, progressive = rng.random(3) < [0.03, 0.1, 0.02]
    options = {"subsampling": "4:4:4" if full else "4:2:0", "progressive": bool(progressive), "exif": exif}
    (picture.convert("L") if grey else picture).save(path, "JPEG", quality=int(rng.integers(88, 94)), **options)


def _draw_files(job: tuple[Path, int, int, int, range]) -> int:
    """Draw and write the images `numbers` of one class folder; returns how many."""
    folder, seed, split, label, numbers = job
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        tagged = number % 40 == 1 and label % 4 == 1  # by number, so that a small set has some as well
        key = (seed, split, label, number)
        _save(draw_image(*key), folder / f"{number:04d}.JPEG", _random(*key, 1), tagged)
    return len(numbers)


def make_demo(
    destination: str | Path,
    *,
    classes: int = 10,
    train_per_class: int = 300,
    val_per_class: int = 50,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> bool:
    """Make the set in `destination`; False where the same set stands there already, whole.

    Writes {train,val}/CLASS/NNNN.JPEG, class_index.json (label: [folder, words]), README.txt and demo.json (parameters)
    with `workers` processes (default: one a core; 1: this one), in a folder beside it that is renamed at the end, so an
    interrupted run leaves nothing (a killed one, that folder: .NAME.PROCESS.HEX). `progress` is called in this process.
    Raises DataError for impossible numbers and for a destination that is taken or cannot be written.
    """
    destination = Path(os.path.abspath(Path(destination).expanduser()))
    if not 2 <= classes <= len(MOTIFS) or min(train_per_class, val_per_class) < 1 or seed < 0:
        numbers = f"{classes} classes, {train_per_class} + {val_per_class} images per class, seed {seed}"
        raise DataError(f"no demo set of {numbers}: use 2 to {len(MOTIFS)} classes, at least 1 image, a seed from 0 on")
    wanted = {"recipe": RECIPE, "classes": classes, "train": train_per_class, "val": val_per_class, "seed": seed}
    if _is_there(destination, wanted):
        return False
    aside = destination.with_name(f".{destination.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        aside.mkdir(parents=True)
        _fill(aside, wanted, workers, progress)
        aside.rename(destination)  # replaces an empty folder, never a full one
    except OSError as error:
        raise DataError(f"{destination} cannot be written ({error.strerror}): choose another destination") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return True


def _is_there(destination: Path, wanted: dict[str, int]) -> bool:
    """Whether `destination` holds the set; DataError where it holds anything else."""
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    found = (destination / _STAMP).read_text() if (destination / _STAMP).is_file() else None
    counts = {split: sum(1 for _ in destination.glob(f"{split}/*/*.JPEG")) for split in SPLITS}
    same = found == json.dumps(wanted)
    if same and counts == {split: wanted["classes"] * wanted[split] for split in SPLITS}:
        return True
    what = "an incomplete demo set" if same else "a demo set of other parameters" if found else "other data"
    raise DataError(f"{destination} exists and holds {what}: remove it or choose another destination")


def _fill(folder: Path, wanted: dict[str, int], workers: int | None, progress: Progress | None) -> None:
    names = list(MOTIFS)[: wanted["classes"]]
    jobs = [
        (folder / name / motif, wanted["seed"], split, label, range(first, min(first + _JOB, wanted[name])))
        for split, name in enumerate(SPLITS)
        for label, motif in enumerate(names)
        for first in range(0, wanted[name], _JOB)
    ]
    total, done = sum(len(job[-1]) for job in jobs), 0
    with closing(run_jobs(_draw_files, jobs, workers)) as counts:  # on an error nothing may write here any more
        for drawn in counts:
            done += drawn
            if progress is not None:
                progress(done, total)
    (folder / "class_index.json").write_text(json.dumps({label: [name, name] for label, name in enumerate(names)}))
    (folder / "README.txt").write_text(_README.format(**wanted))
    (folder / _STAMP).write_text(json.dumps(wanted))
