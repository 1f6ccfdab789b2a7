"""Pieces of HTML. Whatever comes from a run passes `text`: names of classes and files may hold anything."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any


class Markup(str):
    """HTML as it is; every other string is escaped by `text`."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """`value` as HTML that shows it, whatever it holds; also safe between double quotes."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value), quote=True))


def tag(name: str, /, *inside: Any, **attributes: Any) -> Markup:
    """An element; an attribute's underscore is a hyphen, `cls` is class, and None leaves the attribute out."""
    names = {key: "class" if key == "cls" else key.replace("_", "-") for key in attributes}
    given = "".join(f' {names[key]}="{text(value)}"' for key, value in attributes.items() if value is not None)
    return Markup(f"<{name}{given}>{join(inside)}</{name}>")


def join(pieces: Iterable[Any]) -> Markup:
    return Markup("".join(text(piece) for piece in pieces))


def table(head: list[Any], rows: list[list[Any]], numbers: Iterable[int] = ()) -> Markup:
    """A table; the columns `numbers` are set right, in figures of one width."""
    right = set(numbers)

    def line(cells: list[Any], name: str) -> Markup:
        return tag("tr", *(tag(name, cell, cls="number" if i in right else None) for i, cell in enumerate(cells)))

    body = tag("tbody", *(line(row, "td") for row in rows))
    return tag("div", tag("table", tag("thead", line(head, "th")) if head else "", body), cls="scroll")


def percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}%"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def span(seconds: float) -> str:
    """A length of time in its two largest units: 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f} s"
    minutes, hours = int(seconds / 60), int(seconds / 3600)
    if hours == 0:
        return f"{minutes} min {int(seconds) % 60:02} s"
    if hours < 48:
        return f"{hours} h {minutes % 60:02} min"
    return f"{hours // 24} d {hours % 24} h"
