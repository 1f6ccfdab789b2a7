"""report.html: one or several runs on one page that needs nothing but itself, in light and dark, for screen and print.

Numbers first, then what bounds the run, then the curves, where the time went, what it gets wrong, and the facts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.report.breakdown import breakdown, shares
from trainer.report.charts import COLOURS
from trainer.report.classes import classes
from trainer.report.curves import curves, switches
from trainer.report.health import health
from trainer.report.markup import Markup, join, number, percent, span, table, tag
from trainer.report.runs import Run

HERE = Path(__file__).parent


def page(runs: list[Run]) -> str:
    """The page of at least one run, as a whole HTML document."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [_single(runs[0]) if len(runs) == 1 else _several(runs)]
    body.append(tag("section", tag("h2", "Curves"), switches(), curves(runs), cls="charts"))
    body.append(_time(runs))
    if len(runs) > 1:
        body.append(_differences(runs))
    body += [_details(run, len(runs) > 1) for run in runs]
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        tag("title", f"{title} · imagenet-trainer"),
        tag("style", Markup((HERE / "page.css").read_text())),
    )
    script = tag("script", Markup((HERE / "page.js").read_text()))
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', *body), script), lang='en')}\n"


def _single(run: Run) -> Markup:
    best, verdict, last = run.best, health(run), (run.evaluations or [None])[-1]
    epoch, epochs = (run.train or [{}])[-1].get("epoch", 0), run.plan.get("epochs", 0)
    reached = f"in epoch {best['epoch']:.4g}" if best else "not evaluated yet"
    numbers = [
        _hero(percent(best["top1"] if best else None), "best top-1", reached),
        _hero(number(run.images_per_second), "images per second", _each(run)),
        _hero(span(run.wall_seconds), "wall time", _reached(run)),
        _hero(f"{epoch:.4g}", f"of {epochs:g} epochs", _last(last)),
    ]
    data = f"{run.plan.get('samples', 0):,} images"
    words = [str(word) for word in (run.config.get("model.name"), data, run.origin.get("devices")) if word]
    top = [tag("h1", run.name, _status(run)), tag("p", " · ".join(words), cls="note")]
    return join([_top(*top), tag("div", *numbers, cls="heroes"), _verdict(verdict.bound, verdict.text)])


def _top(*inside: Markup) -> Markup:
    return tag("header", tag("p", "imagenet-trainer", cls="brand"), *inside)


def _hero(value: str, name: str, more: str) -> Markup:
    return tag("div", tag("strong", value), tag("span", name), tag("small", more))


def _each(run: Run) -> str:
    ranks, speed = run.plan.get("ranks", 1), run.images_per_second
    mfu = next((record["mfu"] for record in reversed(run.train) if record.get("mfu")), None)
    each = f"{speed / ranks:,.0f} a rank" if speed and ranks > 1 else "without warm-up, evaluation, saving"
    return each + (f", MFU {mfu:.1%}" if mfu else "")


def _reached(run: Run) -> str:
    target, seconds = run.summary.get("target") or {}, run.summary.get("seconds_to_target")
    if seconds and "top1" in target:
        return f"{target['top1']:g}% after {span(seconds)}"
    restarts = sum(event["kind"] == "start" for event in run.events) - 1
    return f"{restarts} restart{'s' * (restarts != 1)}" if restarts > 0 else "without a restart"


def _last(last: dict[str, Any] | None) -> str:
    return f"last top-1 {percent(last['top1'])}, top-5 {percent(last.get('top5'))}" if last else ""


def _status(run: Run) -> Markup:
    kind = run.status if run.status in ("done", "stopped", "failed") else "running"
    return tag("span", run.status, cls=f"status {kind}")


def _verdict(bound: str, words: str) -> Markup:
    """What bounds the run, with its first words, up to a colon, said louder."""
    head, colon, rest = words.partition(":")
    return tag("p", tag("strong", head + colon), rest, cls=f"verdict {bound}")


def _several(runs: list[Run]) -> Markup:
    rows = []
    for colour, run in enumerate(runs):
        best, last = run.best, run.evaluations[-1]["top1"] if run.evaluations else None
        figures = [percent(best["top1"] if best else None), percent(last), number(run.images_per_second)]
        rows.append([_named(run, colour), *figures, span(run.wall_seconds), _status(run)])
    head = ["run", "best top-1", "last", "images/s", "wall time", ""]
    said = [tag("div", _named(run, i), tag("p", health(run).text, cls="note")) for i, run in enumerate(runs)]
    overview = tag("div", table(head, rows, (1, 2, 3, 4)), cls="overview")
    return join([_top(tag("h1", f"{len(runs)} runs")), overview, tag("div", *said, cls="verdicts")])


def _named(run: Run, colour: int) -> Markup:
    return tag("span", tag("span", cls=f"key line c{colour % COLOURS}"), run.name, cls="run")


def _time(runs: list[Run]) -> Markup:
    seconds = [breakdown(run) for run in runs]
    portions = [shares(parts) for parts in seconds]
    shown = [part for part in MEANING if any(portion.get(part, 0) >= NOTICED for portion in portions)]
    if not shown:
        return Markup("")
    bars = []
    for run, portion in zip(runs, portions):
        pieces = [
            tag("span", cls=f"part {_kind(part)}", style=f"width:{100 * share:.3f}%", title=f"{part}: {share:.1%}")
            for part, share in portion.items()
            if share >= NOTICED
        ]
        label = tag("span", run.name, cls="name") if len(runs) > 1 else ""
        bars.append(tag("div", label, tag("div", *pieces, cls="stack"), cls="split"))
    rows = []
    for part in shown:
        cells = []
        for portion, parts in zip(portions, seconds):
            cells += [f"{portion.get(part, 0):.1%}", span(parts[part])]
        rows.append([tag("span", tag("span", cls=f"swatch {_kind(part)}"), MEANING[part], cls="run"), *cells])
    head = ["", *(cell for run in runs for cell in (run.name, ""))] if len(runs) > 1 else []
    figures = table(head, rows, range(1, 2 * len(runs) + 1))
    return tag("section", tag("h2", "Where the time went"), *bars, figures, cls="time" if len(runs) > 1 else "time one")


def _kind(part: str) -> str:
    return part.replace(" ", "-")


NOTICED = 0.0005  # a share of the time that is worth a line
MEANING = {
    "compute": "computing",
    "data wait": "waiting for images",
    "all-reduce": "waiting for gradients to be reduced",
    "other ranks": "waiting for slower ranks",
    "evaluation": "evaluating",
    "saves": "held up by saves",
    "other": "first steps and the rest",
}


def _differences(runs: list[Run]) -> Markup:
    rows = []
    for key in sorted({key for run in runs for key in run.config} - {"output_dir", "report.name"}):
        values = [run.config.get(key, "–") for run in runs]
        if any(value != values[0] for value in values):
            rows.append([tag("code", key), *("none" if value is None else value for value in values)])
    head = ["option", *(run.name for run in runs)]
    found = table(head, rows) if rows else tag("p", "Their configs are the same.", cls="note")
    return tag("section", tag("h2", "What differs"), found)


def _details(run: Run, several: bool) -> Markup:
    inside = join([classes(run), tag("section", tag("h2", "What ran where"), _facts(run))])
    return tag("details", tag("summary", run.name), inside) if several else inside


def _facts(run: Run) -> Markup:
    origin, plan = run.origin, run.plan
    hosts = [str(host) for host in origin.get("hosts") or [origin.get("host", "")]]
    changed = " with changes" if origin.get("dirty") else ""
    facts: dict[str, Any] = {
        "Folder": run.path,
        "Command": tag("code", " ".join(map(str, origin.get("command") or []))),
        "Commit": f"{str(origin.get('commit') or 'unknown')[:12]}{changed}",
        "Started": origin.get("started"),
        "Devices": origin.get("devices"),
        "Hosts": ", ".join(f"{host} ({hosts.count(host)} ranks)" for host in dict.fromkeys(hosts)),
        **(_plan(plan) if plan else {}),
        "Memory": _memory(run),
        "Seed": origin.get("seed"),
        "Python": origin.get("python"),
        "Versions": ", ".join(f"{name} {version}" for name, version in (origin.get("versions") or {}).items()),
        "Machine": origin.get("machine"),
    }
    pairs = [join([tag("dt", name), tag("dd", value)]) for name, value in facts.items() if value not in (None, "")]
    return tag("dl", *pairs)


def _plan(plan: dict[str, Any]) -> dict[str, str]:
    ranks = f"{plan.get('ranks')} ranks x {plan.get('batch')} images x {plan.get('accumulation')} accumulated"
    return {
        "Batch": f"{plan.get('global_batch')} = {ranks}",
        "Steps": f"{plan.get('total_steps', 0):,}, {plan.get('warmup_steps', 0):,} of them warm-up",
        "Peak learning rate": f"{plan.get('peak_lr', 0):g}",
    }


def _memory(run: Run) -> str:
    found = [record["max_memory_gb"] for record in run.train if record.get("max_memory_gb")]
    return f"{max(found):.2f} GB of the GPU at most" if found else ""
