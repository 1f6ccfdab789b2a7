"""The house rules that a machine can read from the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

# From left to right; imports point left. Within a column they never do, except inside a package, by its own order.
COLUMNS = [
    {"mistakes"},
    {"config_augment", "config_data", "config_model", "config_optim", "config_contradictions"},
    {"config"},
    {"configfile", "plan", "timeline", "environment", "memory", "signals", "rendezvous"},
    {"distributed"},
    {"data", "models", "watchdog", "lars"},
    {
        "optim",
        "schedule",
        "losses",
        "mix",
        "colout",
        "ema",
        "metrics",
        "confusion",
        "precision",
        "snapshot",
        "nonfinite",
        "sam",
    },
    {"labels", "calibration", "picture_grid", "exposed", "compression"},
    {"divergence", "teacher", "precise", "balance"},
    {"loop", "evaluate"},
    {"graphs"},
    {"checkpoint", "report", "state", "learner", "tally", "machine"},
    {"retention", "intake", "accuracy", "answers", "target"},
    {"resume", "saver", "card"},
    {"train", "evaluation", "benchmark", "recording", "study", "predict", "export"},
    {"readiness"},
    {"__main__"},
]
SOURCES = sorted((REPOSITORY / "trainer").rglob("*.py"))
LAUNCHER = sorted((REPOSITORY / "launch").glob("*.py"))


def place(module: str) -> int:
    return next(i for i, column in enumerate(COLUMNS) if module in column)


def imported(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    first = path.relative_to(REPOSITORY / "trainer").parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_imports_point_left(path: Path) -> None:
    module = module_of(path)
    if module == "__init__":
        return
    for name in imported(ast.parse(path.read_text())):
        assert name.split(".")[0] != "launch", f"{path} imports {name}: trainer never imports launch"
        parts = name.split(".")
        if parts[0] == "trainer" and len(parts) > 1 and parts[1] != module:
            assert place(parts[1]) < place(module), f"{path} imports {name}, which does not stand left of {module}"


def test_data_package_has_an_order_of_its_own() -> None:
    order = ["jpeg", "philox", "table", "shards", "index", "room", "stage", "order", "augment", "policies", "ops"]
    order += ["resize", "dali", "pil_ops", "salvage", "feeds", "decoder", "pil", "loader"]
    for path in (REPOSITORY / "trainer" / "data").glob("*.py"):
        inner = {n.split(".")[2] for n in imported(ast.parse(path.read_text())) if n.startswith("trainer.data.")}
        if path.stem in order:
            assert inner & set(order) <= set(order[: order.index(path.stem)]), path


def test_launch_has_an_order_of_its_own() -> None:
    columns = [{"attempt", "affinity", "snapshot", "queue", "profile", "link"}]
    columns += [{"record", "scaling"}, {"job", "script", "state"}]
    columns += [{"submit", "status", "logs", "cancel", "sync", "plan"}, {"sweep"}, {"__main__"}]
    for path in LAUNCHER:
        at = next((i for i, column in enumerate(columns) if path.stem in column), None)
        assert at is not None or path.stem == "__init__", f"{path} has no place"
        names = imported(ast.parse(path.read_text()))
        for name in {n.split(".")[1] for n in names if n.startswith("launch.")}:
            assert any(name in column for column in columns[:at]), f"{path} imports {name}, which is not left of it"
    # Run as a file by whatever Python a node has.
    assert imported(ast.parse((REPOSITORY / "launch" / "attempt.py").read_text())).isdisjoint({"trainer", "omegaconf"})


def test_only_one_file_reads_the_environment() -> None:
    readers = {p.name for p in SOURCES if re.search(r"os\.(environ|getenv)", p.read_text())}
    assert readers == {"environment.py"}


def test_only_two_files_import_dali() -> None:
    users = {p.name for p in SOURCES if any(n.startswith("nvidia") for n in imported(ast.parse(p.read_text())))}
    assert users == {"dali.py", "ops.py"}


def test_the_loop_never_waits_for_the_device() -> None:
    for name in ("loop.py", "evaluate.py"):
        source = (REPOSITORY / "trainer" / name).read_text()
        assert not re.search(r"\.item\(|\.cpu\(|\.tolist\(|synchronize|print\(|is_main", source.split('"""', 2)[2]), (
            name
        )


def test_main_rank_is_named_only_where_it_matters() -> None:
    users = {module_of(p) for p in SOURCES if "is_main" in p.read_text()}
    assert users <= {
        "distributed",
        "checkpoint",
        "report",
        "state",
        "intake",
        "train",
        "evaluation",
        "benchmark",
        "readiness",
    }


def test_modules_are_short() -> None:
    long = {str(p): n for p in [*SOURCES, *LAUNCHER] if (n := len(p.read_text().splitlines())) > 300}
    assert not long, "over 300 lines is a design question"
