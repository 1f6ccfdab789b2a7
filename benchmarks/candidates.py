"""The training steps that step.py compares: ours, and the others' as their repositories have them.

ResNet-50 v1.5 from equal initial weights, on tensors that are there already or on files, which each reads as its
repository does (readers.py). The others are small, and wait for what they wait for in each step:

    examples        pytorch/examples imagenet/main.py: fp32, NCHW, loss and accuracies read from the device every step
    torchvision     references/classification/train.py --amp: autocast, NCHW, the same reading
    timm            train.py --amp --channels-last: its network, optimizer, loss and clip-less update; nothing is read
    convnets        NVIDIA ConvNets --amp --memory-format nhwc: autocast, channels-last, smoothing, decay not on 1-d
    compiled        convnets' step under torch.compile; compiled-max: with mode="max-autotune"
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import readers
import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from trainer import learner, memory, precision  # noqa: E402
from trainer.config import Checkpoint, Config, Data, Loop, Loss, Model, Optim, Precision  # noqa: E402
from trainer.data.loader import TrainingBatches, open_data  # noqa: E402
from trainer.distributed import World  # noqa: E402
from trainer.loop import train_steps  # noqa: E402
from trainer.plan import Plan  # noqa: E402

CLASSES = 1000
Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Work:
    """Batches of how many images, how large, where; and of which files, None: of random tensors that are there."""

    batch: int
    size: int
    device: torch.device
    dtype: torch.dtype | None  # of autocast
    root: str | None = None  # a folder of class folders of JPEG files
    workers: int = 2  # processes or threads that read them

    def batches(self, read: Callable[[readers.Files], Iterator[readers.Batch]]) -> Iterator[readers.Batch]:
        """Images (batch, 3, size, size), normalised, and labels; `read` takes files."""
        if self.root is not None:
            return read(readers.Files(self.root, self.batch, self.size, self.workers, self.device))
        torch.manual_seed(0)
        images = torch.randn(self.batch, 3, self.size, self.size, device=self.device)
        return itertools.repeat((images, torch.randint(CLASSES, (self.batch,), device=self.device)))


def examples(work: Work, dtype: torch.dtype | None = None) -> Step:
    """main.py's train(): `dtype` None is its fp32."""
    kind = work.device.type
    model = _torchvision_model(work.device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(kind, enabled=dtype is torch.float16)
    batches = work.batches(readers.torchvision_loader)

    def step() -> None:
        images, labels = next(batches)
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            output = model(images)
            loss = criterion(output, labels)
        _top(output, labels)
        loss.item()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def timm_train(work: Work) -> Step:
    """train.py's train_one_epoch() with --amp --channels-last --smoothing 0.1."""
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import NativeScaler

    kind = work.device.type
    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=CLASSES).to(work.device, memory_format=torch.channels_last)
    model.train()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
    criterion = LabelSmoothingCrossEntropy(0.1)
    scaler = NativeScaler(device=kind) if work.dtype is torch.float16 else None
    batches = _channels_last(work, readers.timm_loader)

    def step() -> None:
        images, labels = next(batches)
        with torch.autocast(kind, dtype=work.dtype):
            loss = criterion(model(images), labels)
        if scaler is not None:
            scaler(loss, optimizer)
        else:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()  # as train.py does after each update

    return step


def convnets(work: Work, compiled: str | None = None) -> Step:
    """ConvNets' training step; `compiled` is a mode of torch.compile."""
    kind = work.device.type
    model = _torchvision_model(work.device).to(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 3e-5}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.875)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    scaler = torch.amp.GradScaler(kind, enabled=work.dtype is torch.float16)
    network = torch.compile(model, mode=compiled) if compiled else model
    batches = _channels_last(work, readers.convnets_dali)

    def step() -> None:
        images, labels = next(batches)
        with torch.autocast(kind, dtype=work.dtype):
            loss = criterion(network(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(work: Work, **options: object) -> Step:
    """The trainer's own step, with its metrics, as configs/resnet50_90ep.yaml has it; `options` are of Precision."""
    synthetic = work.root is None
    config = Config(
        global_batch_size=work.batch,
        data=Data(
            source="synthetic" if synthetic else "dali",
            root=work.root or "",
            train=".",
            image_size=work.size,
            synthetic_classes=CLASSES,
            threads=work.workers,
        ),
        model=Model(),
        optim=Optim(lr=0.1, momentum=0.875, weight_decay=3e-5),
        loss=Loss(label_smoothing=0.1),
        precision=Precision(**options),
        checkpoint=Checkpoint(),
        loop=Loop(eval_every=0),
    )
    here = World(0, 0, 1, 1, work.device)
    if work.device.type == "cpu":
        memory.keep_freed()  # as trainer.distributed.world does
    precision.set_kernels(config, work.device)
    data = open_data(config, here)
    plan = Plan.of(config, 1, data.samples)
    # A head of as many classes as the others', whatever the files have.
    names = tuple(f"class{i}" for i in range(CLASSES))
    learned = learner.create(config, plan, here, replace(data, classes=names))
    if synthetic:
        batches = _channels_last(work, readers.torchvision_loader)
    else:
        batches = TrainingBatches(config, data, plan, here, 0)
    records = train_steps(learned, batches, range(10**9))
    return lambda: next(records)


def _channels_last(work: Work, read: Callable[[readers.Files], Iterator[readers.Batch]]) -> Iterator[readers.Batch]:
    """`work.batches` in channels-last memory; what is there already is made so once."""
    batches = work.batches(read)
    if work.root is None:
        images, labels = next(batches)
        return itertools.repeat((images.contiguous(memory_format=torch.channels_last), labels))
    return ((images.contiguous(memory_format=torch.channels_last), labels) for images, labels in batches)


MAKERS: dict[str, Callable[[Work], Step]] = {
    "examples": examples,
    "torchvision": lambda work: examples(work, work.dtype),
    "timm": timm_train,
    "convnets": convnets,
    "compiled": lambda work: convnets(work, "default"),
    "compiled-max": lambda work: convnets(work, "max-autotune"),
    "ours": ours,
    "ours compiled": lambda work: ours(work, compile=True),
    "ours unfused": lambda work: ours(work, fused=False),
    # Of a GPU:
    "ours fused": lambda work: ours(work, fused=True),
    "ours folded": lambda work: ours(work, fused=True, folded=True),
    "ours graph": lambda work: ours(work, cuda_graph=True),
    "ours packed": lambda work: ours(work, packed_stem=True),
    "ours fused graph": lambda work: ours(work, fused=True, cuda_graph=True),
    "ours folded graph": lambda work: ours(work, fused=True, folded=True, cuda_graph=True),
    "ours compiled graph": lambda work: ours(work, compile=True, cuda_graph=True),
    "ours all": lambda work: ours(work, fused=True, cuda_graph=True, packed_stem=True),
}
EXTRA = [name for name in MAKERS if name.startswith("ours ") and name != "ours compiled"]  # only where --only says so


def _torchvision_model(device: torch.device) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet50(num_classes=CLASSES).to(device).train()


def _top(output: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """main.py's accuracy(), read from the device."""
    with torch.no_grad():
        _, best = output.topk(5, 1)
        right = best.eq(labels.view(-1, 1))
        return [right[:, :k].float().sum().mul(100.0 / len(labels)).item() for k in (1, 5)]
