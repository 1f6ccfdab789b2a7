"""Building any model, loading its weights, and placing it on the devices."""

from __future__ import annotations

import multiprocessing
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from nets import ALONE, CPU, images, on_meta, ours, same, scatter_norms
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config import ConfigError, Distributed, Model
from trainer.distributed import World
from trainer.models import parallel
from trainer.models.buffers import averaged_buffers, mean_buffers
from trainer.models.build import create, load_weights, unwrap
from trainer.models.parallel import parallelize

# Foreign models


def test_foreign_models_take_the_options_they_have() -> None:
    net = on_meta("timm:resnet18", 7, drop_rate=0.3, drop_path_rate=0.2)
    assert net.drop_rate == 0.3 and net.layer4[-1].drop_path.drop_prob == pytest.approx(0.2)
    assert net.fc.out_features == 7
    for zero in (True, False):
        net = create(Model(name="torchvision:resnet18", zero_init_residual=zero), 7)
        assert type(net).__module__ == "torchvision.models.resnet" and net.fc.out_features == 7
        assert net.layer1[0].bn2.weight.any() != zero
    assert on_meta("torchvision:mobilenet_v3_small", drop_rate=0.35).classifier[2].p == 0.35
    assert on_meta("torchvision:densenet121", drop_rate=0.35).features.denseblock1.denselayer1.drop_rate == 0.35
    assert on_meta("torchvision:convnext_tiny", drop_path_rate=0.4).features[-1][-1].stochastic_depth.p == 0.4
    # Where nothing is asked for, the builder's own default stays.
    assert on_meta("torchvision:mobilenet_v3_small").classifier[2].p == 0.2
    assert isinstance(create(Model(name="torchvision:googlenet"), 7)(images()), Tensor)  # no auxiliary heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet51"}, r"model.name=resnet51 .*mean resnet\d+ or .*ours are resnet18, .*timm:NAME and torchv"),
        ({"name": "timm"}, "model.name=timm is not known"),
        ({"name": "timm:resnet5O"}, "model.name=timm:resnet5O is not known: did you mean timm:resnet50"),
        ({"name": "timm:hf-hub:timm/resnet18"}, "model.name=timm:hf-hub:timm/resnet18 is not known"),
        ({"name": "timm:resnet50.nope"}, "model.name=timm:resnet50.nope cannot be built: Invalid pretrained tag"),
        ({"name": "torchvision:resnet5O"}, "model.name=torchvision:resnet5O .*mean torchvision:resnet50"),
        ({"name": "torchvision:fcn_resnet50"}, "model.name=torchvision:fcn_resnet50 is not known"),
        ({"name": "timm:vgg11", "drop_path_rate": 0.1}, "model.drop_path_rate=0.1: model.name=timm:vgg11 does not ta"),
        ({"name": "timm:vgg11", "zero_init_residual": True}, "model.zero_init_residual=True: .*zero_init_last"),
        (
            {"name": "torchvision:resnet18", "drop_rate": 0.1},
            "model.drop_rate=0.1: .*does not take this; leave out mod",
        ),
        ({"name": "torchvision:convnext_tiny", "drop_rate": 0.1}, "model.drop_rate=0.1: .*does not take this"),
        ({"name": "torchvision:swin_t", "drop_path_rate": 0.3}, "model.drop_path_rate=0.3: .*does not take this"),
        ({"name": "torchvision:vgg11", "zero_init_residual": True}, "model.zero_init_residual=True: .*does not take"),
        ({"name": "timm:resnet18", "variant": "d"}, "model.variant=d: model.name=timm:resnet18 does not take"),
        ({"name": "timm:resnet18", "residual": False}, "model.residual=False: .* does not take"),
        ({"name": "torchvision:resnet18", "shortcut": "B"}, "model.shortcut=B: .* does not take"),
        ({"name": "torchvision:resnet18", "conv_init": "fan_in"}, "model.conv_init=fan_in: .* does not take"),
        ({"residual": False, "zero_init_residual": True}, "model.zero_init_residual=True needs shortcuts"),
        ({"residual": False, "drop_path_rate": 0.1}, "model.drop_path_rate=0.1 needs shortcuts"),
        ({"residual": False, "shortcut": "B"}, "model.shortcut=B needs shortcuts"),
        ({"name": "resnet20", "variant": "d"}, "model.variant=d is for the ImageNet nets"),
        ({"variant": "d", "shortcut": "A"}, "model.shortcut=A has no projection for model.variant=d"),
    ],
)
def test_what_cannot_be_built_says_why(options: dict[str, object], message: str) -> None:
    with torch.device("meta"), pytest.raises(ConfigError, match=message) as caught:
        create(Model(**options), 10)
    assert "\n" not in str(caught.value)


# Weights


@pytest.mark.parametrize(
    "form", ["bare", "model", "state_dict", "wrapped", "folder", "old", "safetensors", "uncounted"]
)
def test_load_weights_reads_every_form(tmp_path: Path, form: str) -> None:
    source, target, path = ours("resnet20"), create(Model(name="resnet20"), 10), tmp_path / "weights.pt"
    scatter_norms(source)
    state = source.state_dict()
    if form == "folder":
        path = tmp_path / "step-1"
        path.mkdir()
        torch.save({"model": state, "step": 1}, path / "state.pt")
    elif form == "safetensors":
        path = path.with_suffix(".safetensors")
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif form == "wrapped":
        torch.save({f"module._orig_mod.{key}": value for key, value in state.items()}, path)
    elif form == "uncounted":  # as torchvision's first files
        torch.save({key: value for key, value in state.items() if "num_batches" not in key}, path)
    else:
        held = {form: state, "epoch": 1} if form in ("model", "state_dict") else state
        torch.save(held, path, _use_new_zipfile_serialization=form != "old")
    load_weights(target, path)
    assert same(target.state_dict(), state)


def test_load_weights_refuses_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"

    def refusal(content: object) -> str:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        model = ours("resnet20")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ConfigError, match=re.escape(f"model.weights={path}")) as caught:
            load_weights(model, path)
        assert "\n" not in str(caught.value) and same(model.state_dict(), before)
        return str(caught.value)

    state = ours("resnet20").state_dict()
    narrow = {key: value[:3] if "layer1.0" in key and value.dim() else value for key, value in state.items()}
    for content, message in (
        (
            ours("resnet20", 7).state_dict(),
            r"has 7 classes \(fc.weight\) and the model has 10: set model.num_classes=7 ",
        ),
        (ours("resnet20", 7).state_dict(), r"to fine-tune on 10 classes set model\.new_head=true"),
        ({key: state[key] for key in state if key != "fc.bias"}, r"lacks 1 \(fc.bias\); set model.name"),
        (state | {"extra": torch.zeros(1)}, r"has also 1 \(extra\); set model.name"),
        (ours("resnet32").state_dict(), r"has also 72 \(layer1.3.conv1.weight, layer1.3.bn1.weight, .*, ...\); set"),
        (
            narrow | {"fc.bias": torch.zeros(4)},
            r"differ in 11 \(layer1.0.conv1.weight \(3, 16, 3, 3\) for \(16, 16, 3, 3\), ",
        ),
        (b"no weights at all", r"not a readable file of weights"),
        (b"", r"not a readable file of weights"),
        ({"args": Path("x")}, r"not a readable .*Unsupported .*Path.*torch.save\(model.state_dict"),
        ({"epoch": 3}, r'holds no state dict, bare or under "model" or "state_dict", but the keys 1 \(epoch\)'),
        ([1], r"but list"),
    ):
        assert re.search(message, refusal(content))
    for missing in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(ConfigError, match=f"model.weights={missing}.* does not exist"):
            load_weights(ours("resnet20"), missing)


# On the devices


def test_parallelize_alone() -> None:
    model = ours("resnet20")
    placed = parallelize(model, ALONE, Distributed(sync_bn=True), channels_last=True, compile=True)
    assert placed is not model and unwrap(placed) is model and unwrap(model) is model
    assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with averaged_buffers(model, ALONE):
        assert same(model.state_dict(), before)
    with pytest.raises(ConfigError, match=r"distributed.sync_bn=true needs GPUs"):
        pair = World(rank=0, local_rank=0, size=2, local_size=2, device=CPU)
        parallelize(model, pair, Distributed(sync_bn=True), channels_last=False, compile=False)


@pytest.mark.parametrize("last, most", [(1, 1), (3, 40), (10, 25), (50, 1000), (10**6, 10**6)])
@pytest.mark.parametrize("count", [1, 2, 37])
def test_buckets_double_from_the_first_layer_on(count: int, last: int, most: int) -> None:
    sizes = torch.randint(1, 30, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    limits = parallel.bucket_limits(sizes, last, most)
    assert sum(limits) == sum(sizes)
    limit = last
    assert limits[0] >= last or len(limits) == 1
    for size in limits[:0:-1]:  # all but the first to be reduced, which takes what is left
        assert limit <= size < limit + max(sizes)
        limit = min(2 * limit, most)
    # DDP, which adds gradients from the last layer on until a limit is reached, cuts where we did.
    filled, taken = [0], 0
    for size in reversed(sizes):
        filled[-1] += size
        if filled[-1] >= limits[taken]:
            filled.append(0)
            taken = min(taken + 1, len(limits) - 1)
    assert [size for size in filled if size] == limits


def one_of_two(rank: int, folder: Path) -> None:
    store, patience = f"file://{folder}/store", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    world = World(rank=rank, local_rank=rank, size=2, local_size=2, device=CPU)
    model = ours("resnet20")
    if rank == 1:
        nn.init.zeros_(model.fc.weight)  # all start from rank 0's
        scatter_norms(model)
    model = parallelize(model, world, Distributed(), channels_last=True, compile=False)
    assert isinstance(model, DistributedDataParallel)
    model.eval()  # a batch of its own per rank would make the norms differ
    half = slice(2 * rank, 2 * rank + 2)
    nn.functional.cross_entropy(model(images(4, 32)[half]), torch.arange(4)[half]).backward()
    result = {"gradients": [p.grad.clone() for p in model.parameters()]}
    model.train()(images(4, 32)[half])
    with torch.no_grad():
        model.eval()(images(4, 32)[half])  # must not take over rank 0's statistics, as DDP does after a training pass
    result["own"] = [b.clone() for b in model.buffers()]
    buffers = dict(unwrap(model).named_buffers())
    result["mean"] = list(mean_buffers(world.gather({k: b.clone() for k, b in buffers.items()})).values())
    with averaged_buffers(model, world):
        result["agreed"] = [b.clone() for b in model.buffers()]
    result["after"] = [b.clone() for b in model.buffers()]
    torch.save(result, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_make_one_batch_and_agree_on_statistics(tmp_path: Path) -> None:
    other = multiprocessing.get_context("spawn").Process(target=one_of_two, args=(1, tmp_path))
    other.start()
    one_of_two(0, tmp_path)
    other.join()
    assert other.exitcode == 0
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    model = ours("resnet20").eval()
    nn.functional.cross_entropy(model(images(4, 32)), torch.arange(4)).backward()
    for rank in ranks:
        for gradient, parameter in zip(rank["gradients"], model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ranks[0]["own"][0], ranks[1]["own"][0])
    for mine, theirs, *agreed in zip(*(rank[key] for key in ("own", "agreed") for rank in ranks), strict=True):
        torch.testing.assert_close(agreed[0], (mine + theirs) / 2 if mine.is_floating_point() else mine)
        assert torch.equal(*agreed)
    for rank in ranks:
        assert all(map(torch.equal, rank["after"], rank["own"])), "each rank has its own again"
        assert all(map(torch.equal, rank["mean"], rank["agreed"])), "what is saved is what was evaluated"
