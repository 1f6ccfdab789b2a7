"""DALI's pixels: PIL's, from real ImageNet files (grey, EXIF-rotated, CMYK and very large ones among them)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, backend, fn
from PIL import Image
from torchvision.transforms import v2

from trainer.data import dali, ops
from trainer.data.augment import evaluation_windows
from trainer.data.policies import Op

EXIF_ORIENTATION = 274


GREY = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}  # leaves grey levels 0 to 255


def decode(
    mode: str, files: list[Path], flips: np.ndarray, starts: np.ndarray, shapes: np.ndarray, **normalised: tuple
) -> torch.Tensor:
    """Grey levels 0 to 255, NCHW, of a 224 px graph; or what `normalised`, mean and std, makes of them."""
    paths = [np.frombuffer(str(file).encode(), np.uint8) for file in files]
    rest = () if mode == "padded" else (shapes.astype(np.float32) if mode == "center" else shapes.astype(np.int32),)
    sides = np.full((len(files), 2), 224, np.float32 if mode == "resized" else np.int32)
    fed = (paths, np.arange(len(files)), flips.astype(np.int32), starts.astype(np.int32), sides, *rest)
    graph = dali.Graph(mode=mode, max_batch=len(files), threads=1, prefetch=1, **(normalised or GREY))
    feeds = iter([fed])
    images, labels = dali.run(dali.build(graph, lambda: next(feeds)))
    assert labels.tolist() == list(range(len(files)))
    assert images.is_contiguous(memory_format=torch.channels_last), "NHWC as DALI made it, seen as NCHW"
    return images


def difference(ours: torch.Tensor, theirs: list[Image.Image]) -> tuple[float, float]:
    """(mean absolute difference in grey levels, share of values that differ by more than one level)."""
    reference = np.stack([np.asarray(image, float) for image in theirs])
    delta = abs(ours.permute(0, 2, 3, 1).numpy() - reference)
    return delta.mean(), (delta > 1).mean()


def notable(root: Path) -> list[Path]:
    """30 files, among them every grey, rotated, CMYK and giant one of the sample."""
    files = sorted(root.rglob("*.JPEG"))
    special = []
    for file in files:
        with Image.open(file) as image:
            rotated = image.getexif().get(EXIF_ORIENTATION, 1) != 1
            if image.mode != "RGB" or rotated or image.width * image.height > 3_000_000:
                special.append(file)
    assert special, "the sample is known to hold grey, rotated and giant images"
    return special + [f for f in files if f not in special][: 30 - len(special)]


def test_training_crops_equal_pil(imagenet_sample: Path) -> None:
    files = notable(imagenet_sample)
    random = np.random.default_rng(0)
    sizes = np.array([Image.open(f).size for f in files])
    shape = (sizes * random.uniform(0.3, 1.0, sizes.shape)).astype(int)
    start = ((sizes - shape) * random.uniform(0, 1, sizes.shape)).astype(int)
    flips = random.integers(0, 2, len(files))
    theirs = []
    for file, (x, y), (w, h), flip in zip(files, start, shape, flips):
        crop = Image.open(file).convert("RGB").crop((x, y, x + w, y + h)).resize((224, 224), Image.Resampling.BILINEAR)
        theirs.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)
    mean, beyond = difference(decode("resized", files, flips, start[:, ::-1], shape[:, ::-1]), theirs)
    assert mean < 0.3 and beyond < 0.005


def test_evaluation_crops_equal_torchvision(imagenet_sample: Path) -> None:
    files = notable(imagenet_sample)
    width, height, window = evaluation_windows(256, 224, *np.array([Image.open(f).size for f in files]).T)
    ours = decode("center", files, window.flip, np.stack([window.y, window.x], 1), np.stack([height, width], 1))
    transform = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    mean, beyond = difference(ours, [transform(Image.open(file).convert("RGB")) for file in files])
    assert mean < 0.3 and beyond < 0.005


def test_kinds_of_file_that_are_not_plain_rgb_jpeg(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:240, 0:260]
    smooth = np.stack([x % 256, y % 256, (x + y) // 2 % 256], -1).astype(np.uint8)
    picture = Image.fromarray(smooth)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    picture.save(tmp_path / "rotated.JPEG", quality=95, exif=exif)
    picture.convert("L").save(tmp_path / "grey.JPEG", quality=95)
    picture.convert("CMYK").save(tmp_path / "cmyk.JPEG", quality=95)
    picture.save(tmp_path / "png.JPEG", format="PNG")
    picture.save(tmp_path / "progressive.JPEG", quality=95, progressive=True)
    files = sorted(tmp_path.iterdir())
    start = random.integers(0, 16, (len(files), 2))
    shape = np.full((len(files), 2), 224)
    theirs = [Image.open(f).convert("RGB").crop((x, y, x + 224, y + 224)) for f, (y, x) in zip(files, start)]
    mean, _ = difference(decode("padded", files, np.zeros(len(files)), start, shape), theirs)
    assert mean < 0.5


@pytest.mark.parametrize("mode", ["padded", "center"])
def test_padding_is_black_outside_the_image(tmp_path: Path, mode: str) -> None:
    Image.fromarray(np.full((224, 224, 3), 200, np.uint8)).save(tmp_path / "a.png")
    image = decode(mode, [tmp_path / "a.png"], np.zeros(1), np.array([[-4, 3]]), np.full((1, 2), 224))[0]
    assert (image[:, :4] == 0).all() and (image[:, :, -3:] == 0).all()
    assert (image[:, 4:, :-3] == 200).all()


@pytest.mark.parametrize("mode", ["resized", "padded", "center"])
def test_pixels_are_normalised(tmp_path: Path, mode: str) -> None:
    random = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(random.integers(0, 256, (240, 260, 3), np.uint8)).save(tmp_path / f"{name}.png")
    shapes = np.array([[230, 224], [224, 231]])
    fed = (mode, sorted(tmp_path.iterdir()), np.array([0, 1]), np.zeros((2, 2), int), shapes)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (decode(*fed).double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(decode(*fed, mean=mean, std=std).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["padded", "resized"])
def test_an_output_outlives_the_next_batches(tmp_path: Path, mode: str) -> None:
    for value in range(8):
        Image.fromarray(np.full((8, 8, 3), value * 30, np.uint8)).save(tmp_path / f"{value}.png")

    def feed():
        for value in range(8):
            path = np.frombuffer(str(tmp_path / f"{value}.png").encode(), np.uint8)
            sides = np.full((1, 2), 8, np.int32)
            rest = (sides.astype(np.float32), sides) if mode == "resized" else (sides,)
            yield ([path], np.array([value]), np.zeros(1, np.int32), np.zeros((1, 2), np.int32), *rest)

    graph = dali.Graph(mode=mode, max_batch=1, threads=1, prefetch=2, **GREY)
    feeds = feed()
    pipeline = dali.build(graph, lambda: next(feeds))
    kept = [dali.run(pipeline) for _ in range(8)]
    for value, (image, label) in enumerate(kept):
        assert (image == value * 30).all() and label == value


@pytest.mark.parametrize("encoded", [False, True])
def test_what_dali_refuses_is_found_among_what_it_takes(tmp_path: Path, encoded: bool) -> None:
    graph = dali.Graph(mode="padded", max_batch=1, threads=1, prefetch=1, mean=(0,) * 3, std=(1,) * 3, encoded=encoded)
    Image.new("RGB", (20, 20)).save(tmp_path / "0.JPEG")
    whole = (tmp_path / "0.JPEG").read_bytes()
    contents = [whole, whole[: len(whole) // 2], b"hello" * 100, whole, whole, b"no"]
    files = []
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.JPEG").write_bytes(content)
        files.append(np.frombuffer(content if encoded else str(tmp_path / f"{number}.JPEG").encode(), np.uint8))
    assert dali.refused(files, graph) == [1, 2, 5]
    assert dali.refused(files[:1], graph) == [] == dali.refused([], graph)


def test_the_gpu_decoder_is_told_what_the_options_say() -> None:
    plain = {
        "mode": "resized",
        "max_batch": 1,
        "threads": 1,
        "prefetch": 1,
        "mean": (0,) * 3,
        "std": (1,) * 3,
    }
    assert dali.hardware(dali.Graph(**plain)) == {}
    chosen = dali.hardware(dali.Graph(**plain, hw_decoder_load=0.9, decode_pixels=5980 * 6430))
    known = fn.decoders.image_slice.__doc__ or ""
    assert all(f"\n{name} : " in known for name in chosen), "DALI has these options under these names"
    assert chosen["hw_decoder_load"] == 0.9
    assert chosen["preallocate_width_hint"] * chosen["preallocate_height_hint"] >= 5980 * 6430
    assert 211_025_920 <= chosen["device_memory_padding"] < 1.01 * 211_025_920
    assert 140_544_512 <= chosen["host_memory_padding"] < 1.02 * 140_544_512


@pytest.mark.parametrize("mode", ["resized", "padded", "center"])
@pytest.mark.parametrize("decode_on_gpu", [True, False], ids=["gpu", "cpu"])
def test_a_gpu_has_every_operator_that_its_graph_asks_of_it(
    monkeypatch: pytest.MonkeyPatch, mode: str, decode_on_gpu: bool
) -> None:
    """As far as that can be seen without one: the graph is defined, and not built."""
    pipelines: list[Pipeline] = []
    monkeypatch.setattr(Pipeline, "build", lambda pipeline: pipelines.append(pipeline))
    steps = ops.Steps(layers=(tuple(Op), tuple(Op)), erase=True, bilinear=True)
    sizes = {"max_batch": 8, "threads": 1, "prefetch": 1, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    device = {"device_id": 0, "decode_on_gpu": decode_on_gpu, "half": True}
    dali.build(dali.Graph(mode=mode, **sizes, **device, steps=steps), lambda: None)
    has = {"cpu": backend.RegisteredCPUOps(), "gpu": backend.RegisteredGPUOps(), "mixed": backend.RegisteredMixedOps()}
    asked = set()
    for pipeline in pipelines:
        pipeline._build_graph()
        asked |= {(node._op.device, str(node.spec).split()[2].rstrip(":")) for node in pipeline._ops}
    assert [each for each in sorted(asked) if each[1] not in has[each[0]]] == []
    on_gpu = {name for where, name in asked if where == "gpu"}
    assert {"CropMirrorNormalize", "Erase", "WarpAffine", "Equalize", "Filter", "CoordTransform"} <= on_gpu
    assert any(where == "mixed" for where, _ in asked) == decode_on_gpu
