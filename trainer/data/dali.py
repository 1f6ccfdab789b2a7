"""The DALI graph: file bytes to a batch of crops, on CPU or GPU. Only this file and ops.py import DALI.

DALI draws nothing: paths, windows, flips and labels come from outside, so a batch is a pure function of its arguments.
The resize is DALI's triangular filter, which is PIL's bilinear, and EXIF orientation is ignored as torchvision and timm
ignore it (ImageNet holds rotated tags): a test holds the pixels to PIL's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from trainer.data import ops

# What `source` returns for each graph, in this order: see `Graph.source`.
Feed = tuple[list[np.ndarray] | np.ndarray, ...]


NO_STEPS = ops.Steps()


@dataclass(frozen=True, kw_only=True)
class Graph:
    """What one pipeline does.

    Modes, and what `source()` must return (lists and arrays of one entry an image; files are uint8 arrays, each the
    path of a file or, where `encoded`, its bytes):
        "resized": files, labels, flips, window starts (y, x), sides, window shapes (h, w); resizes them to the sides
        "padded":  files, labels, flips, window starts, sides; cuts them out, black outside the image
        "center":  files, labels, flips, window starts, sides, shapes of the whole image after its resize
    The sides (h, w) of the images that come out are equal within a batch, and may change from one to the next.
    """

    mode: str
    max_batch: int
    threads: int
    prefetch: int
    mean: tuple[float, ...]  # in units of [0, 1]
    std: tuple[float, ...]
    device_id: int | None = None  # the GPU that the images end on; None: CPU
    decode_on_gpu: bool = False
    half: bool = False  # float16 instead of float32 out
    encoded: bool = False  # the source gives the bytes of files, not their paths
    steps: ops.Steps = NO_STEPS  # operations on the crop; what ops.feed returns comes last from the source


def build(graph: Graph, source: Callable[[], Feed]) -> Pipeline:
    """A built pipeline that calls `source` for each batch, ahead of need; its outputs are (images NHWC, labels)."""
    count = {"resized": 6, "padded": 5, "center": 6}[graph.mode]

    @pipeline_def(  # and no `with pipeline`: only here does DALI turn `if` into a choice for each sample
        batch_size=graph.max_batch,
        num_threads=graph.threads,
        device_id=graph.device_id,
        prefetch_queue_depth=graph.prefetch,
        enable_conditionals=bool(graph.steps.layers),
    )
    def define():
        outputs = count + graph.steps.inputs
        files, labels, flips, starts, sides, *rest = fn.external_source(source=source, num_outputs=outputs)
        images = _cut(graph, files if graph.encoded else fn.io.file.read(files), starts, sides, rest)
        if graph.device_id is not None:
            images, labels = images.gpu(), labels.gpu()
        inputs = rest[count - 5 :]
        images = fn.crop_mirror_normalize(
            ops.apply(images, graph.steps, inputs),
            mirror=flips,
            mean=[255 * m for m in graph.mean],
            std=[255 * s for s in graph.std],
            dtype=types.FLOAT16 if graph.half else types.FLOAT,
            output_layout="HWC",
        )
        return ops.erase(images, graph.steps, inputs), labels

    pipeline = define()
    pipeline.build()
    return pipeline


def _cut(graph: Graph, data, starts, sides, rest):
    options = {
        "device": "mixed" if graph.decode_on_gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,
    }
    if graph.mode == "resized":
        images = fn.decoders.image_slice(data, starts, rest[0], axes=[0, 1], **options)
        return fn.resize(images, size=sides, interp_type=types.INTERP_TRIANGULAR)
    images = fn.decoders.image(data, **options)
    if graph.mode == "center":
        images = fn.resize(images, size=rest[0], interp_type=types.INTERP_TRIANGULAR)
    return fn.slice(images, starts, sides, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)


def run(pipeline: Pipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """The next (images, labels): images NCHW in channels-last memory, labels int64 of shape (n,).

    Nothing is copied: the tensors are DALI's own buffers, which live as long as the tensors do. Raises StopIteration
    where the source does, and RuntimeError, naming the file, where an image cannot be decoded.
    """
    images, labels = (torch.from_dlpack(output.as_tensor()) for output in pipeline.run())
    return images.permute(0, 3, 1, 2), labels.reshape(-1)


def reset(pipeline: Pipeline) -> None:
    """Make a pipeline whose source has ended call it again."""
    pipeline.reset()


def refused(files: list[np.ndarray], graph: Graph) -> list[int]:
    """Which of these files, as `graph` is given them, DALI cannot decode: their places in the list."""
    waiting: list[np.ndarray] = []
    found = []
    pipeline = None
    for number, file in enumerate(files):
        pipeline = pipeline or _probe(graph, waiting)
        waiting.append(file)
        try:
            pipeline.run()
        except RuntimeError:
            found.append(number)
            waiting.clear()
            pipeline = None  # one that has failed may not go on
    return found


def _probe(graph: Graph, waiting: list[np.ndarray]) -> Pipeline:
    """A pipeline that decodes one file of `waiting` at a time."""
    pipeline = Pipeline(
        batch_size=1,
        num_threads=1,
        device_id=graph.device_id,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    with pipeline:
        data = fn.external_source(source=lambda: [waiting.pop()])
        data = data if graph.encoded else fn.io.file.read(data)
        device = "mixed" if graph.decode_on_gpu else "cpu"
        pipeline.set_outputs(fn.decoders.image(data, device=device, output_type=types.RGB, adjust_orientation=False))
    pipeline.build()
    return pipeline
