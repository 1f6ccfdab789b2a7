"""The DALI graph: file bytes to a batch of crops, on CPU or GPU. Only this file and ops.py import DALI.

DALI draws nothing: paths, windows, flips and labels come from outside, so a batch is a pure function of its arguments.
The resize is PIL's bilinear: DALI's triangular filter on a GPU, torch's code on the CPU, where DALI's takes nearly as
long as the decoding. What a CPU trains on and is only flipped and normalised after that, torch finishes too. EXIF
orientation is ignored as torchvision and timm ignore it: ImageNet holds rotated tags. A test holds the pixels to PIL's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from trainer.data import ops
from trainer.data.link import Feed, Link, Normalising, to_decode

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
    hw_decoder_load: float | None = None  # share of the images for the GPU's JPEG hardware; None: DALI's default
    decode_pixels: int | None = None  # size the GPU decoder's buffers for this many pixels; None: DALI's default
    half: bool = False  # float16 instead of float32 out
    encoded: bool = False  # the source gives the bytes of files, not their paths
    steps: ops.Steps = NO_STEPS  # operations on the crop; what ops.feed returns comes last from the source


def build(graph: Graph, source: Callable[[], Feed]) -> Decoding:
    """What decodes the batches that `source` names, which it calls ahead of need, in the thread that calls `run`."""
    if graph.decode_on_gpu or graph.mode == "padded":
        return _from([_whole(graph, source)])
    plain = graph.device_id is None and graph.steps == NO_STEPS and not graph.half
    link = Normalising(graph, source) if plain else Link(graph, source)
    link.decode = _decoder(graph, link.named)
    if plain:
        return Decoding([link.decode], link.next)
    return _from([link.decode, _finish(graph, link.next)])


def _from(pipelines: list[Pipeline]) -> Decoding:
    return Decoding(pipelines, lambda: tuple(torch.from_dlpack(each.as_tensor()) for each in pipelines[-1].run()))


def decode_only(graph: Graph, source: Callable[[], Feed]) -> Decoding:
    """The decoding of the same batches and nothing after it: what the rest is measured against."""

    def named() -> Feed:
        files, *feed = source()
        return to_decode(graph.mode, files, feed)

    pipeline = _decoder(graph, named)
    return Decoding([pipeline], pipeline.run)


@dataclass(frozen=True)
class Decoding:
    """One pipeline, or two with the CPU's resize between them: `batch` returns the next (images NHWC, labels)."""

    pipelines: list[Pipeline]
    batch: Callable[[], tuple]


def run(decoding: Decoding) -> tuple[torch.Tensor, torch.Tensor]:
    """The next (images, labels): images NCHW in channels-last memory, labels int64 of shape (n,).

    Nothing is copied: the tensors are the buffers that were filled. DALI takes them back when the tensors are let go,
    whatever a GPU has yet to do with them. Raises StopIteration where the source does, and RuntimeError, naming the
    file, where an image cannot be decoded.
    """
    images, labels = decoding.batch()
    return images.permute(0, 3, 1, 2), labels.reshape(-1)


def reset(decoding: Decoding) -> None:
    """Make one whose source has ended call it again."""
    for pipeline in decoding.pipelines:
        pipeline.reset()


def _pipeline(graph: Graph, source: Callable, count: int, define: Callable) -> Pipeline:
    """A built pipeline of what `define` makes of the `count` nodes that the source feeds."""

    @pipeline_def(  # and no `with pipeline`: only here does DALI turn `if` into a choice for each sample
        batch_size=graph.max_batch,
        num_threads=graph.threads,
        device_id=graph.device_id,
        prefetch_queue_depth=graph.prefetch,
        enable_conditionals=bool(graph.steps.layers),
    )
    def whole():
        return define(graph, *fn.external_source(source=source, num_outputs=count))

    pipeline = whole()
    pipeline.build()
    return pipeline


def _whole(graph: Graph, source: Callable[[], Feed]) -> Pipeline:
    """Everything in one."""
    count = {"resized": 6, "padded": 5, "center": 6}[graph.mode]

    def define(graph: Graph, files, labels, flips, starts, sides, *rest):
        images = _decode(graph, files, *([starts, rest[0]] if graph.mode == "resized" else []))
        if graph.mode != "padded":
            size = rest[0] if graph.mode == "center" else sides
            images = fn.resize(images, size=size, interp_type=types.INTERP_TRIANGULAR)
        if graph.mode != "resized":
            images = _crop(images, starts, sides)
        return _finished(graph, images, labels, flips, rest[count - 5 :])

    return _pipeline(graph, source, count + graph.steps.inputs, define)


def _finish(graph: Graph, source: Callable[[], Feed]) -> Pipeline:
    """From resized images on: they come first from the source, in the place of the files."""

    def define(graph: Graph, images, labels, flips, *inputs):
        images = fn.reshape(images, layout="HWC")
        if graph.mode == "center":
            starts, sides, *inputs = inputs
            images = _crop(images, starts, sides)
        return _finished(graph, images, labels, flips, inputs)

    return _pipeline(graph, source, (5 if graph.mode == "center" else 3) + graph.steps.inputs, define)


def _decoder(graph: Graph, source: Callable[[], Feed]) -> Pipeline:
    """Of what `to_decode` names."""
    return _pipeline(graph, source, 3 if graph.mode == "resized" else 1, _decode)


def _decode(graph: Graph, files, *window):
    """The node of whole images, or of their window where its start and shape are given."""
    data = files if graph.encoded else fn.io.file.read(files)
    options = {"device": "cpu", "output_type": types.RGB, "adjust_orientation": False}
    if graph.decode_on_gpu:
        options |= {"device": "mixed", **hardware(graph)}
    if window:
        return fn.decoders.image_slice(data, *window, axes=[0, 1], **options)
    return fn.decoders.image(data, **options)


def hardware(graph: Graph) -> dict[str, float | int]:
    """Options of the GPU decoder. Not run on a GPU: names and units are those of DALI 2.4's documentation."""
    options: dict[str, float | int] = {}
    if graph.hw_decoder_load is not None:
        options["hw_decoder_load"] = graph.hw_decoder_load
    if graph.decode_pixels is not None:
        side = math.isqrt(graph.decode_pixels - 1) + 1
        options |= {"preallocate_width_hint": side, "preallocate_height_hint": side}
        # Bytes for a pixel, as in DALI's PyTorch ResNet-50 example: 211,025,920 and 140,544,512 for 5980 x 6430.
        options["device_memory_padding"] = math.ceil(5.5 * graph.decode_pixels)
        options["host_memory_padding"] = math.ceil(3.7 * graph.decode_pixels)
    return options


def _crop(images, starts, sides):
    return fn.slice(images, starts, sides, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)


def _finished(graph: Graph, images, labels, flips, inputs):
    """The nodes of a batch as training takes it, from images of their final size."""
    if graph.device_id is not None:
        images, labels = images.gpu(), labels.gpu()
    images = fn.crop_mirror_normalize(
        ops.apply(images, graph.steps, inputs),
        mirror=flips,
        mean=[255 * m for m in graph.mean],
        std=[255 * s for s in graph.std],
        dtype=types.FLOAT16 if graph.half else types.FLOAT,
        output_layout="HWC",
    )
    return ops.erase(images, graph.steps, inputs), labels


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
