"""The DALI graph: file bytes to a batch of crops, on CPU or GPU. Only this file and ops.py import DALI.

DALI draws nothing: paths, windows, flips and labels come from outside, so a batch is a pure function of its arguments.
The resize is PIL's bilinear: DALI's triangular filter on a GPU, torch's code on the CPU, where DALI's takes nearly as
long as the decoding. What a CPU trains on and is only flipped and normalised after that, torch finishes too. EXIF
orientation is ignored as torchvision and timm ignore it: ImageNet holds rotated tags. A test holds the pixels to PIL's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from trainer.data import ops
from trainer.data.normalise import Normaliser
from trainer.data.resize import Resizer

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
    hw_decoder_load: float | None = None  # share of the images for the GPU's JPEG hardware; None: DALI's default
    decode_pixels: int | None = None  # size the GPU decoder's buffers for this many pixels; None: DALI's default
    half: bool = False  # float16 instead of float32 out
    encoded: bool = False  # the source gives the bytes of files, not their paths
    steps: ops.Steps = NO_STEPS  # operations on the crop; what ops.feed returns comes last from the source


def build(graph: Graph, source: Callable[[], Feed]) -> Decoding:
    """What decodes the batches that `source` names, which it calls ahead of need, in the thread that calls `run`."""
    if graph.decode_on_gpu or graph.mode == "padded":
        return _from([_whole(graph, source)])
    if graph.device_id is None and graph.steps == NO_STEPS and not graph.half:
        link = _Normalising(graph, source)
        return Decoding([link.decode], link.next)
    link = _Link(graph, source)
    return _from([link.decode, _finish(graph, link.next)])


def _from(pipelines: list[Pipeline]) -> Decoding:
    return Decoding(pipelines, lambda: tuple(torch.from_dlpack(each.as_tensor()) for each in pipelines[-1].run()))


def decode_only(graph: Graph, source: Callable[[], Feed]) -> Decoding:
    """The decoding of the same batches and nothing after it: what the rest is measured against."""

    def named() -> Feed:
        files, *feed = source()
        return _to_decode(graph, files, feed)

    pipeline = _pipeline(graph, named, 3 if graph.mode == "resized" else 1, _decode)
    return Decoding([pipeline], pipeline.run)


@dataclass(frozen=True)
class Decoding:
    """One pipeline, or two with the CPU's resize between them: `batch` returns the next (images NHWC, labels)."""

    pipelines: list[Pipeline]
    batch: Callable[[], tuple]


def run(decoding: Decoding) -> tuple[torch.Tensor, torch.Tensor]:
    """The next (images, labels): images NCHW in channels-last memory, labels int64 of shape (n,).

    Nothing is copied: the tensors are the buffers that were filled, which live as long as the tensors do. Raises
    StopIteration where the source does, and RuntimeError, naming the file, where an image cannot be decoded.
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


class _Link:
    """From the decoding of a batch on the CPU to its resize, which runs a batch ahead, for DALI to finish."""

    def __init__(self, graph: Graph, source: Callable[[], Feed]) -> None:
        self._graph, self._source = graph, source
        self._feeds: deque[Feed] = deque()  # what the batches in flight need after their decoding
        self._begun: deque[tuple] = deque()
        self.decode = _pipeline(graph, self._named, 1 if graph.mode == "center" else 3, _decode)
        self._prepare()

    def next(self) -> tuple:
        """A batch that is ready, while the next one is being made; StopIteration after the last."""
        while len(self._begun) < 2:
            try:
                (decoded,) = self.decode.run()
            except StopIteration:
                break
            labels, *feed = self._feeds.popleft()
            images = [torch.from_dlpack(decoded[i]) for i in range(len(labels))]
            self._begun.append(self._begin(images, labels, *feed))
        if not self._begun:
            raise StopIteration
        futures, *batch = self._begun.popleft()
        for future in futures:
            future.result()
        return tuple(batch)

    def _named(self) -> Feed:
        """What the decoder is to decode."""
        files, *feed = self._source()
        self._feeds.append(tuple(feed))
        return _to_decode(self._graph, files, feed)

    def _prepare(self) -> None:
        self._resizer = Resizer(self._graph.threads)
        # The pipeline copies what it is fed. Fresh memory would be 2,400 new pages for a batch of 64.
        self._squares = deque(torch.empty(0, dtype=torch.uint8) for _ in range(2))

    def _begin(self, images: list[torch.Tensor], labels, flips, starts, sides, shapes, *inputs) -> tuple:
        """(futures to wait for, what `_finish` asks for)."""
        if self._graph.mode == "center":
            into = [torch.empty(*map(int, shape), 3, dtype=torch.uint8) for shape in shapes]
            feed = [image.numpy() for image in into], labels, flips, starts, sides, *inputs
        else:
            into = self._square(int(sides[0, 0]))[: len(images)]
            feed = into.numpy(), labels, flips, *inputs
        return self._resizer.begin(images, into), *feed

    def _square(self, side: int) -> torch.Tensor:
        """A buffer for a batch of images of this side: the one that was used before the last."""
        self._squares.rotate()
        shape = (self._graph.max_batch, side, side, 3)
        if self._squares[0].shape != shape:
            self._squares[0] = torch.empty(shape, dtype=torch.uint8)
        return self._squares[0]


class _Normalising(_Link):
    """From the decoding to the end, for a CPU and pixels that nothing else is done to: (images NHWC, labels)."""

    def _prepare(self) -> None:
        self._normaliser = Normaliser(self._graph.threads, self._graph.mean, self._graph.std)

    def _begin(self, images: list[torch.Tensor], labels, flips, starts, sides, shapes) -> tuple:
        if self._graph.mode == "resized":  # the window has been cut out before
            starts, shapes = np.zeros_like(shapes), sides
        futures, batch = self._normaliser.begin(images, shapes, starts, int(sides[0, 0]), flips)
        return futures, batch, torch.from_numpy(labels)


def _to_decode(graph: Graph, files: list[np.ndarray], feed: list[np.ndarray]) -> Feed:
    """What `_decode` is given of a batch."""
    return (files, feed[2], feed[4]) if graph.mode == "resized" else (files,)


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
