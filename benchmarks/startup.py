"""From the command to the first training step: ours against a plain PyTorch script, and what of it is imports.

    python benchmarks/startup.py DATA [--blocks 5] [--out FILE]

DATA is an ImageFolder with train/. Each measurement is a process of its own; they alternate. ResNet-50 at 224 px, batch
2, so that the step itself weighs little:

    help        python -m trainer --help
    torch       python -c "import torch, torchvision": what neither can do without
    script      as pytorch/examples imagenet/main.py begins: ImageFolder, DataLoader, ResNet-50, SGD, one step
    ours        python -m trainer train, until the record of its first step is written; the index of DATA is there, as
                in every run but the first
    first       the same without the index

The files are in the page cache for all of them. Prints a table; --out writes everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from about import about

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH = 2
SCRIPT = """
import sys
import torch, torchvision
from torchvision import datasets, transforms
crop = transforms.Compose([transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
    transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
data = datasets.ImageFolder(sys.argv[1] + "/train", crop)
model = torchvision.models.resnet50(num_classes=len(data.classes)).train()
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
loader = torch.utils.data.DataLoader(data, batch_size=int(sys.argv[2]), shuffle=True, num_workers=2)
images, labels = next(iter(loader))
loss = torch.nn.functional.cross_entropy(model(images), labels)
loss.backward()
optimizer.step()
print(loss.item(), flush=True)
"""


def until_end(*arguments: str) -> float:
    """Seconds that `python ARGUMENTS` takes."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def until_first_line(data: str) -> float:
    """Seconds until the script has printed the loss of its first step."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", SCRIPT, data, str(BATCH)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        return time.perf_counter() - began


def until_first_record(data: str) -> float:
    """Seconds until a run on `data` has written the record of its first step."""
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "run" / "metrics.jsonl"
        words = [f"data.root={data}", f"output_dir={folder}/run", f"global_batch_size={BATCH}", "loop.max_steps=2"]
        words += ["loop.eval_every=0", "report.log_every=1", "report.wandb=disabled"]
        command = [sys.executable, "-m", "trainer", "train", "configs/resnet50_90ep.yaml", *words]
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while not (records.exists() and records.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"the run ended without a step: {process.stderr.read().decode()}")
                time.sleep(0.005)
            took = time.perf_counter() - began
        return took


def without_index(data: str) -> float:
    """`until_first_record` where DATA is seen for the first time."""
    for index in Path(data).glob("*/.imagenet-trainer-index*"):
        index.unlink()
    return until_first_record(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="ImageFolder with train/")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    data = str(Path(options.data).resolve())
    cases: dict[str, Callable[[], float]] = {
        "help": lambda: until_end("-m", "trainer", "--help"),
        "torch": lambda: until_end("-c", "import torch, torchvision"),
        "script": lambda: until_first_line(data),
        "ours": lambda: until_first_record(data),
        "first": lambda: without_index(data),
    }
    for case in cases.values():
        case()  # what Python compiles, and the page cache
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.blocks):
        for name, case in cases.items():
            seconds[name].append(case())
    ratios = [ours / script for ours, script in zip(seconds["ours"], seconds["script"])]
    result = about() | {
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "spread": {name: [round(min(values), 3), round(max(values), 3)] for name, values in seconds.items()},
        "ours_to_script": round(statistics.median(ratios), 3),
    }
    for name, value in result["seconds"].items():
        low, high = result["spread"][name]
        print(f"  {name:8} {value:7.3f} s  {low:7.3f} .. {high:.3f}")
    print(f"  ours takes {result['ours_to_script']} times as long as the script")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
