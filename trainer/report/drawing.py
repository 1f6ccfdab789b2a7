"""report.html of a run under way, made by a thread while training goes on."""

from __future__ import annotations

import threading

from trainer.mistakes import warn
from trainer.report import page, runs
from trainer.report.folder import RunFolder
from trainer.signals import held

PATIENCE = 60.0  # seconds for which the end of a run waits for the last page


class Drawing:
    """Makes report.html anew, one at a time; what goes wrong is warned of, once, and no other harm is done."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._alive = True

    def begin(self) -> None:
        """Begin a page of what the run folder holds now, unless one is still being made: the next has it all."""
        if not self._alive or (self._thread is not None and self._thread.is_alive()):
            return
        # A daemon: whoever ends the process waits for no page.
        self._thread = threading.Thread(target=self._draw, name="report", daemon=True)
        with held():
            self._thread.start()

    def finish(self) -> None:
        """Return when the last page is made."""
        self._join()
        self.begin()
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join(PATIENCE)

    def _draw(self) -> None:
        try:
            self._folder.try_to_write("report.html", page.page([runs.read(self._folder.path)]))
        except Exception as error:
            self._alive = False
            warn(f"no more report.html of {self._folder.path}: {type(error).__name__}: {error}; training goes on")
