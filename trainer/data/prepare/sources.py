"""Recognising a source by what lies in it."""

from __future__ import annotations

from pathlib import Path

from trainer.data.index import DataError
from trainer.data.prepare import archives, folders, parquet
from trainer.data.prepare.samples import Source, some

_LOOKED_FOR = (
    f"{archives.TRAIN} with {archives.VAL} and {archives.DEVKIT}; {folders.KAGGLE_DATA} (Kaggle); "
    f"{folders.TINY_VAL} (Tiny-ImageNet); *.parquet here or in data/; "
    f"train/CLASS/ with {', '.join(f'{name}/CLASS/' for name in folders.VAL_FOLDERS[:-1])} or "
    f"{folders.VAL_FOLDERS[-1]}/CLASS/"
)


def recognise(root: Path) -> Source:
    """The source in a folder; DataError says what was looked for and what is there, or what is wrong with a source."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise DataError(f"the source {root} {what}: give the folder that holds the archives or images")
    try:
        if any((root / name).is_file() for name in (archives.TRAIN, archives.VAL, archives.DEVKIT)):
            return archives.ilsvrc(root)
        if (root / folders.KAGGLE_DATA).is_dir():
            return folders.kaggle(root)
        if (root / folders.TINY_VAL).is_file():
            return folders.tiny(root)
        if parquet.find(root):
            return parquet.parquet(root)
        if (root / "train").is_dir() and any((root / name).is_dir() for name in folders.VAL_FOLDERS):
            return folders.image_folder(root)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the source {root} cannot be read ({error}): correct that, then run again") from None
    there = sorted(path.name + "/" * path.is_dir() for path in root.iterdir() if not path.name.startswith("."))
    raise DataError(f"the source {root} is not known: looked for {_LOOKED_FOR}; it holds {some(there, 8) or 'nothing'}")
