"""Our training step against those of other trainers and of torch.compile, side by side in one run.

    python benchmarks/step.py [--batch 32] [--size 224] [--blocks 5] [--steps 4] [--only NAME ...] [--out FILE]
                              [--root FOLDER | --draw COUNT] [--workers 2]

candidates.py says who is compared, and how each does it. Every candidate is a process of its own, and all take blocks
of steps in turn (turns.py); compilation and first steps are outside the clock. All train on the same tensors, which are
there before the clock starts; with --root on the same JPEG files, of class folders in FOLDER, or on COUNT of them that
are drawn for it, which each reads as its repository does (readers.py). Who waits is stopped then, with its workers, so
that nobody reads ahead meanwhile. Workers have CPU time and memory of their own, which are not counted.

The limit is the arithmetic's: 24.30 GFLOP an image at 224 px (forward 4.089 GMAC, backward twice that without the first
layer's gradient to the image), at the rate of a large matrix product of the same dtype measured in the same run. A GPU
is nearer to the limit of its memory, which traffic.py counts: 470 MB an image where BatchNorm and ReLU are passes of
their own, 351 MB where they are fused, 303 MB where they are folded too, at the rate of a copy.
Prints a table; --out writes everything as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import drawn
import torch
import turns
from about import about
from candidates import EXTRA, MAKERS, Work
from traffic import folded, fused, unfused

from trainer import precision
from trainer.config import Precision

GFLOP_AT_224 = 24.30
MB_AT_224 = {way.__name__: way(224) for way in (unfused, fused, folded)}


def serve(name: str, options: argparse.Namespace, device: torch.device) -> None:
    """What the process of a candidate does."""
    dtype = precision.amp_dtype(Precision(), device)
    if name == "limit":
        with turns.answers() as answer:
            answer({})
            for _ in sys.stdin:
                answer({"product": product_rate(dtype or torch.float32, device), "copy": copy_rate(device)})
                turns.give_back(device)
    else:
        given = {"root": options.root, "workers": options.workers}
        work = Work(batch=options.batch, size=options.size, device=device, dtype=dtype, **given)
        turns.serve(lambda: MAKERS[name](work), device)


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best_of_five(lambda: a @ b, device)


def copy_rate(device: torch.device) -> float:
    """Bytes/s, those read and those written, of a copy that fits in no cache, the best of five."""
    source = torch.ones((2**31 if device.type == "cuda" else 2**28) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_of_five(lambda: target.copy_(source), device)


def _best_of_five(work: turns.Step, device: torch.device) -> float:
    best = float("inf")
    for _ in range(6):  # the first may set something up
        turns.wait(device)
        began = time.perf_counter()
        work()
        turns.wait(device)
        best = min(best, time.perf_counter() - began)
    return best


class Comparison:
    """Candidates that take turns, and what came of it."""

    def __init__(self, names: list[str], options: argparse.Namespace) -> None:
        self.options, self.ends = options, time.monotonic() + options.within
        self.failed: dict[str, str] = {}
        self.machine: list[dict] = []
        self.running: dict[str, turns.Candidate] = {}
        self.found: dict[str, list[dict]] = {name: [] for name in ["limit", *names]}
        for name in self.found:
            if not self._left():
                self.failed[name] = "no time was left"
                continue
            try:
                self.running[name] = turns.Candidate(
                    name, self._command(name), min(options.start_within, self._left()), stops=options.root is not None
                )
            except turns.Lost as lost:
                self._leave_out(name, lost)

    def measure(self) -> None:
        took = 0.0
        for _ in range(self.options.blocks):
            began = time.monotonic()
            if self._left() < 1.2 * took:  # another round would be cut
                break
            for name in list(self.running):
                note = functools.partial(self._note, name)
                try:
                    found = self.running[name].block(self.options.steps, self._left(), note)
                    self.found[name].append(found)
                except turns.Lost as lost:
                    self._leave_out(name, lost)
            took = time.monotonic() - began

    def _left(self) -> float:
        """Seconds."""
        return max(0.0, self.ends - time.monotonic())

    def end(self) -> None:
        for candidate in self.running.values():
            candidate.dismiss()
        for candidate in self.running.values():
            candidate.end()

    def result(self) -> dict:
        """All of it, for JSON. Costs are medians of the blocks."""
        options, limits = self.options, self.found["limit"]
        found = {name: self.found[name] for name in self.running if name != "limit" and self.found[name]}
        result = about() | {
            "batch": options.batch,
            "size": options.size,
            "dtype": str(precision.amp_dtype(Precision(), _device())),
            "threads": options.threads or torch.get_num_threads(),
            "files": options.root is not None,
            "workers": options.workers if options.root else None,
            "images_per_second": {k: round(options.batch / _median(v, "wall"), 2) for k, v in found.items()},
            "spread": {
                k: [round(options.batch / f(b["wall"] for b in v), 2) for f in (max, min)] for k, v in found.items()
            },
            "cpu_seconds_a_step": {k: round(_median(v, "cpu"), 4) for k, v in found.items()},
            "page_faults_a_step": {k: round(_median(v, "faults")) for k, v in found.items()},
            "peak_memory_mb": {k: round(max(b["peak"] for b in v) / 1e6) for k, v in found.items()},
            "idle_cpu_seconds": {k: round(max(b["idle_cpu"] for b in v), 4) for k, v in found.items()},
            "seconds_to_warm": {k: round(self.running[k].ready["seconds_to_warm"], 1) for k in found},
            "failed": self.failed,
            "machine": self.machine,
        }
        area = (options.size / 224) ** 2
        if limits:
            product, copy = (max(block[key] for block in limits) for key in ("product", "copy"))
            result["product_tflops"] = round(product / 1e12, 3)
            result["copy_gb_per_second"] = round(copy / 1e9, 1)
            result["limit_images_per_second"] = round(product / (GFLOP_AT_224 * 1e9 * area), 2)
            if _device().type == "cuda":
                memory = {kind: round(copy / (mb * 1e6 * area), 1) for kind, mb in MB_AT_224.items()}
                result["memory_limit_images_per_second"] = memory
        return result | self._ratios(found)

    def _ratios(self, found: dict[str, list[dict]]) -> dict:
        """How many times as fast ours is as each other, in the same block: [median, least, most]."""
        ratios = {}
        for mine in (name for name in found if name.startswith("ours")):
            for other in (name for name in found if not name.startswith("ours")):
                each = sorted(b["wall"] / a["wall"] for a, b in zip(found[mine], found[other]))
                ratios.setdefault(mine, {})[other] = [round(x, 3) for x in (statistics.median(each), each[0], each[-1])]
        return {"ratios": ratios}

    def _command(self, name: str) -> list[str]:
        options = self.options
        command = [sys.executable, __file__, "--serve", name, "--batch", options.batch, "--size", options.size]
        if options.threads:
            command += ["--threads", options.threads]
        if options.root:
            command += ["--root", options.root, "--workers", options.workers]
        return [str(word) for word in command]

    def _note(self, name: str) -> None:
        self.machine.append({"during": name} | turns.machine_now())

    def _leave_out(self, name: str, lost: turns.Lost) -> None:
        self.failed[name] = str(lost)
        print(f"  {name} is left out: {lost}", file=sys.stderr, flush=True)
        if name in self.running:
            self.running.pop(name).end()


def table(result: dict) -> None:
    """Print it."""
    limit = result.get("limit_images_per_second")
    for name, value in result["images_per_second"].items():
        low, high = result["spread"][name]
        share = f"{value / limit:.2f} of the limit" if limit else ""
        costs = f"{result['cpu_seconds_a_step'][name]:8.3f} CPU s a step, peak {result['peak_memory_mb'][name]} MB"
        print(f"  {name:18} {value:9.2f} images/s  {low:9.2f} .. {high:<9.2f}  {share}  {costs}")
    if limit:
        print(f"  limit              {limit:9.2f} images/s: {result['product_tflops']} TFLOP/s of matrix products")
    for kind, value in result.get("memory_limit_images_per_second", {}).items():
        print(f"  {kind:18} {value:9.2f} images/s: a copy's {result['copy_gb_per_second']} GB/s")
    rates = result["images_per_second"]
    best = max((name for name in rates if not name.startswith("ours")), key=rates.get, default=None)
    for mine, ratios in result["ratios"].items():
        for name in dict.fromkeys(["examples", best]):
            if name in ratios:
                middle, low, high = ratios[name]
                print(f"  {mine} is {middle} times {name} ({low} to {high})")


def _median(blocks: list[dict], key: str) -> float:
    return statistics.median(block[key] for block in blocks)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256 if torch.cuda.is_available() else 32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30 if torch.cuda.is_available() else 2, help="a block")
    parser.add_argument("--threads", type=int, help="of torch, on a CPU")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--root", type=Path, help="train on JPEG files: class folders")
    files.add_argument("--draw", type=int, metavar="COUNT", help="train on JPEG files that are drawn for it")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads that read them")
    parser.add_argument("--only", nargs="+", help="candidates")
    parser.add_argument(
        "--start-within", type=float, default=900, help="seconds for a candidate to compile and warm up"
    )
    parser.add_argument(
        "--within", type=float, default=36000, help="seconds for all; what is done by then is the result"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # the process of a candidate
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.serve:
        serve(options.serve, options, _device())
        return
    if options.root is not None and not options.root.is_dir():
        parser.error(f"--root {options.root}: there is no such folder")
    if unknown := set(options.only or ()) - set(MAKERS):
        parser.error(f"--only {' '.join(sorted(unknown))}: use {', '.join(MAKERS)}")
    names = [name for name in MAKERS if name in (options.only or set(MAKERS) - set(EXTRA))]
    with tempfile.TemporaryDirectory() as folder:
        if options.draw:
            drawn.draw(Path(folder), options.draw)
            options.root = Path(folder) / "train"
        comparison = Comparison(names, options)
        try:
            comparison.measure()
            result = comparison.result()
            table(result)
            if options.out:  # now: ending so many processes may take longer than is left
                options.out.write_text(json.dumps(result, indent=2) + "\n")
        finally:
            comparison.end()


if __name__ == "__main__":
    main()
