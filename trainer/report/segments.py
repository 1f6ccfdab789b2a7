"""The files that W&B's client leaves on disk, one for each process that logged: how far the history in them goes.

A segment is a log in LevelDB's format (blocks of 32 KiB, records cut at their ends) of W&B's own protocol buffers. The
client has no reader of it in Python any more; its terminal viewer takes seconds to start.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.report.rows import Position

_BLOCK, _HEAD, _FILE_HEAD = 32768, 7, 7  # bytes
_FULL, _FIRST, _LAST = 1, 2, 4  # kinds of a record's parts; 3: in the middle


def written(folder: Path, identity: str) -> Position:
    """How far the rows go that the processes before this one left below `folder`/wandb of the W&B run `identity`."""
    reached = Position()
    for path in (folder / "wandb").glob(f"*run-*-{identity}/run-{identity}.wandb"):
        for row in history(path):
            reached = reached.after(Position.of(row))
    return reached


def history(segment: Path) -> Iterator[dict[str, Any]]:
    """The rows of one segment, as far as a kill let it be written; nested values are left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    for content in _records(segment.read_bytes()):
        record = Record.FromString(content)
        if record.HasField("history"):
            items = ((item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item)
            yield {key: json.loads(value) for key, value in items}


def _records(log: bytes) -> Iterator[bytes]:
    at, parts = _FILE_HEAD, b""
    while at + _HEAD <= len(log):
        room = _BLOCK - at % _BLOCK
        if room < _HEAD:
            at += room
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        begin, end = at + _HEAD, at + _HEAD + size
        if not _FULL <= kind <= _LAST or end > len(log):  # the end of what was written
            return
        parts = (b"" if kind in (_FULL, _FIRST) else parts) + log[begin:end]
        if kind in (_FULL, _LAST):
            yield parts
        at = end
