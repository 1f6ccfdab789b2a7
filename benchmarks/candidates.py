"""The training steps that step.py compares: ours, and the others' as their repositories have them.

ResNet-50 v1.5 from equal initial weights. The others are small, and wait for what they wait for in each step:

    examples        pytorch/examples imagenet/main.py: fp32, NCHW, loss and accuracies read from the device every step
    torchvision     references/classification/train.py --amp: autocast, NCHW, the same reading
    timm            train.py --amp --channels-last: its network, optimizer, loss and clip-less update; nothing is read
    convnets        NVIDIA ConvNets --amp --memory-format nhwc: autocast, channels-last, smoothing, decay not on 1-d
    compiled        convnets' step under torch.compile; compiled-max: with mode="max-autotune"
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from trainer import learner, memory, precision  # noqa: E402
from trainer.config import Checkpoint, Config, Data, Loss, Model, Optim, Precision  # noqa: E402
from trainer.data.loader import DataSet  # noqa: E402
from trainer.distributed import World  # noqa: E402
from trainer.loop import train_steps  # noqa: E402
from trainer.plan import Plan  # noqa: E402

CLASSES = 1000
Step = Callable[[], object]


def examples(images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype | None = None) -> Step:
    """main.py's train(): `dtype` None is its fp32."""
    model = _torchvision_model(images)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(images.device.type, enabled=dtype is torch.float16)

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            output = model(images)
            loss = criterion(output, labels)
        _top(output, labels)
        loss.item()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def timm_train(images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype | None) -> Step:
    """train.py's train_one_epoch() with --amp --channels-last --smoothing 0.1."""
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import NativeScaler

    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=CLASSES).to(images.device, memory_format=torch.channels_last)
    model.train()
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4)
    criterion = LabelSmoothingCrossEntropy(0.1)
    scaler = NativeScaler(device=images.device.type) if dtype is torch.float16 else None

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype):
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


def convnets(
    images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype | None, compiled: str | None = None
) -> Step:
    """ConvNets' training step; `compiled` is a mode of torch.compile."""
    model = _torchvision_model(images).to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 3e-5}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.875)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    scaler = torch.amp.GradScaler(images.device.type, enabled=dtype is torch.float16)
    network = torch.compile(model, mode=compiled) if compiled else model

    def step() -> None:
        with torch.autocast(images.device.type, dtype=dtype):
            loss = criterion(network(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(images: torch.Tensor, labels: torch.Tensor, **options: object) -> Step:
    """The trainer's own step, with its metrics, as configs/resnet50_90ep.yaml has it; `options` are of Precision."""
    config = Config(
        global_batch_size=len(images),
        data=Data(source="synthetic", image_size=images.shape[-1], synthetic_classes=CLASSES),
        model=Model(),
        optim=Optim(lr=0.1, momentum=0.875, weight_decay=3e-5),
        loss=Loss(label_smoothing=0.1),
        precision=Precision(**options),
        checkpoint=Checkpoint(),
    )
    here = World(0, 0, 1, 1, images.device)
    if images.device.type == "cpu":
        memory.keep_freed()  # as trainer.distributed.world does
    precision.set_kernels(config, images.device)
    classes = tuple(f"class{i}" for i in range(CLASSES))
    data = DataSet(None, None, config.data.synthetic_samples, classes, "synthetic")
    learned = learner.create(config, Plan.of(config, 1, data.samples), here, data)
    images = images.contiguous(memory_format=torch.channels_last)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield images, labels

    records = train_steps(learned, batches(), range(10**9))
    return lambda: next(records)


# By name: from images, labels and the dtype of autocast to a step.
MAKERS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.dtype | None], Step]] = {
    "examples": lambda images, labels, dtype: examples(images, labels),
    "torchvision": examples,
    "timm": timm_train,
    "convnets": convnets,
    "compiled": lambda *given: convnets(*given, "default"),
    "compiled-max": lambda *given: convnets(*given, "max-autotune"),
    "ours": lambda images, labels, dtype: ours(images, labels),
    "ours compiled": lambda images, labels, dtype: ours(images, labels, compile=True),
    "ours unfused": lambda images, labels, dtype: ours(images, labels, fused=False),
    # Of a GPU:
    "ours fused": lambda images, labels, dtype: ours(images, labels, fused=True),
    "ours folded": lambda images, labels, dtype: ours(images, labels, fused=True, folded=True),
    "ours graph": lambda images, labels, dtype: ours(images, labels, cuda_graph=True),
    "ours packed": lambda images, labels, dtype: ours(images, labels, packed_stem=True),
    "ours fused graph": lambda images, labels, dtype: ours(images, labels, fused=True, cuda_graph=True),
    "ours folded graph": lambda images, labels, dtype: ours(images, labels, fused=True, folded=True, cuda_graph=True),
    "ours compiled graph": lambda images, labels, dtype: ours(images, labels, compile=True, cuda_graph=True),
    "ours all": lambda images, labels, dtype: ours(images, labels, fused=True, cuda_graph=True, packed_stem=True),
}
EXTRA = [name for name in MAKERS if name.startswith("ours ") and name != "ours compiled"]  # only where --only says so


def _torchvision_model(images: torch.Tensor) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet50(num_classes=CLASSES).to(images.device).train()


def _top(output: torch.Tensor, labels: torch.Tensor) -> list[float]:
    """main.py's accuracy(), read from the device."""
    with torch.no_grad():
        _, best = output.topk(5, 1)
        right = best.eq(labels.view(-1, 1))
        return [right[:, :k].float().sum().mul(100.0 / len(labels)).item() for k in (1, 5)]
