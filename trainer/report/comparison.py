"""The report command: one page of the runs in some folders, finished or under way."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.config import ConfigError
from trainer.report import page, runs


def write_report(folders: list[str], output: str | None = None) -> Path:
    """Write the page of `folders` and return where it is; ConfigError if that cannot be."""
    found = [runs.read(folder) for folder in folders]
    where = Path(output) if output else found[0].path / "report.html" if len(found) == 1 else Path("report.html")
    aside = where.with_name(f".{where.name}.{os.getpid()}")
    try:
        aside.write_text(page.page(found), encoding="utf-8")
        os.replace(aside, where)
    except OSError as error:
        raise ConfigError(f"{where} cannot be written ({error.strerror}): choose another --output") from error
    return where
