"""The tests that need a GPU, as one JSON: how many passed, failed and were skipped, and which failed.

python benchmarks/gpu_tests.py [FILE ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from about import about

REPOSITORY = Path(__file__).resolve().parents[1]
FILES = ("tests/test_gpu_norm.py", "tests/test_graphs.py", "tests/test_gpu.py")
NONE_RAN = 5  # pytest's exit status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES, help="of tests")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    # In several processes where pytest-xdist is there: most of the time is that of Triton's compiler.
    many = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *many]
        status = subprocess.run([*command, f"--junitxml={xml}", *options.files], cwd=REPOSITORY).returncode
        suite = ElementTree.parse(xml).getroot()[0]
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        case.get("name")
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    if options.out:
        result = about() | {"status": status, **counts, "failed": failed}
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if status == NONE_RAN else status


if __name__ == "__main__":
    sys.exit(main())
