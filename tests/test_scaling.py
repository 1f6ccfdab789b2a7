"""Planning for more nodes: the link's formulas, the replay of reductions, the points, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch import link, scaling
from launch.__main__ import main
from launch.link import Link
from launch.scaling import IMPOSSIBLE, Cluster, at, points, powers, replay, shares
from trainer import timeline
from trainer.config import Config, ConfigError, Data, Optim
from trainer.timeline import Bucket, Timeline

# 100 images in 150 ms, 100 of them backward; 10 MB after 40 ms, 10 after 70, 5 at the end
ONE = Timeline(
    device="a GPU",
    images=100,
    step=0.150,
    backward=0.100,
    buckets=(Bucket(10_000_000, 0.040), Bucket(10_000_000, 0.070), Bucket(5_000_000, 0.100)),
)
FREE = Link(net_gbit=1e9, node_gb_s=1e9, net_hop_us=0, node_hop_us=0, start_us=0)


def config(**given: object) -> Config:
    return Config(**{"global_batch_size": 800, "data": Data(source="synthetic"), **given})


# The link


def test_a_node_is_a_ring_and_nodes_take_the_quicker_of_ring_and_tree() -> None:
    plain = Link(net_gbit=80, net_share=1.0, net_hop_us=10, node_gb_s=100, node_hop_us=1, start_us=0)
    assert plain.seconds(10**9, 1, 1) == 0
    within = 2 * 7 * 1e-6 + 2 * 7 / 8 * 10**9 / 100e9
    assert plain.seconds(10**9, 1, 8) == pytest.approx(within)
    ring = 2 * 3 * 10e-6 + 2 * 3 / 4 * (10**9 / 8) / 10e9  # 80 Gb/s are 10 GB/s; a GPU sends its eighth
    assert plain.seconds(10**9, 4, 8) == pytest.approx(within + ring)
    tree = 2 * 10 * 10e-6 + 2 * 8000 / 8 / 10e9  # of a small reduction over 1024 nodes a ring is all hops
    assert plain.seconds(8000, 1024, 8) == pytest.approx(2 * 7 * 1e-6 + 2 * 7 / 8 * 8000 / 100e9 + tree)
    shared = replace(plain, net_per_node=True)
    assert shared.seconds(10**9, 4, 8) - within == pytest.approx(8 * (ring - 60e-6) + 60e-6)
    assert replace(plain, start_us=7).seconds(10**9, 4, 8) == pytest.approx(within + ring + 7e-6)


def test_a_link_is_a_number_or_a_profile(tmp_path: Path) -> None:
    assert link.of("200") == Link(net_gbit=200) and link.of("100/node") == Link(net_gbit=100, net_per_node=True)
    (tmp_path / "l.yaml").write_text("{net_gbit: 25, steal: 0.1}")
    assert link.of(str(tmp_path / "l.yaml")) == Link(net_gbit=25, steal=0.1)


# The replay


@pytest.mark.parametrize(
    ("lasts", "exposed"),
    [
        ((0, 0, 0), 0),
        ((30, 30, 0), 0),  # the second ends with the pass
        ((10, 10, 7), 7),  # the last is never hidden
        ((50, 30, 7), 27),  # 40..90, 90..120, 120..127
        ((100, 1, 1), 42),
    ],
)
def test_reductions_queue_behind_their_bucket_and_each_other(lasts: tuple[float, ...], exposed: float) -> None:
    queue = iter(lasts)
    found = replay(ONE, lambda size: next(queue) / 1000)
    assert found.exposed == pytest.approx(exposed / 1000) and found.slowed == pytest.approx(0)
    queue = iter(lasts)
    assert replay(replace(ONE, passes=2.0), lambda size: next(queue) / 1000).exposed == pytest.approx(exposed / 500)


def test_what_a_reduction_takes_of_the_processor_the_pass_has_not() -> None:
    # All of it: nothing is hidden, however early a bucket is ready.
    whole = replay(ONE, lambda size: 0.020, steal=1.0)
    assert whole.slowed + whole.exposed == pytest.approx(0.060) and whole.exposed == pytest.approx(0.020)
    # Half: 40..60 does 10 ms of the pass, so that 70 is reached at 80; 80..100 does 10 more, and 20 are left.
    half = replay(ONE, lambda size: 0.020, steal=0.5)
    assert half.slowed == pytest.approx(0.020) and half.exposed == pytest.approx(0.020)
    # The pass ends while the second reduction lasts: 80 + 30/0.5 = 140 of 180; the third ends at 280.
    long = replay(replace(ONE, buckets=ONE.buckets[:2]), lambda size: 0.020 if size < 10 else 0.100, steal=0.5)
    assert long.slowed + long.exposed == pytest.approx(0.140)


# Points


def test_nothing_is_lost_on_a_perfect_link_and_the_run_follows() -> None:
    cluster = Cluster(gpus=8, link=FREE)
    found = points(config(), shares(config(), [1, 2, 4], 8, 1, strong=False), [ONE], cluster, 80_000)
    assert [p.global_batch for p in found] == [800, 1600, 3200] and [p.ranks for p in found] == [8, 16, 32]
    assert all(p.efficiency == pytest.approx(1) and p.of_one == pytest.approx(1) for p in found)
    assert [p.marginal for p in found[1:]] == pytest.approx([1, 1])
    assert [p.epoch for p in found] == pytest.approx([15.0, 7.5, 3.75])
    assert found[0].run == pytest.approx(9000 * 0.150) and found[0].notes == {}


def test_the_learning_rate_follows_the_configs_own_rule() -> None:
    cluster, scaled = Cluster(gpus=8, link=FREE), config(optim=Optim(lr=0.1, scale_lr="linear", lr_batch=400))
    images = shares(scaled, [1, 2], 8, 1, strong=False)
    assert [p.lr for p in points(scaled, images, [ONE], cluster, 80_000)] == pytest.approx([0.2, 0.4])
    fixed = points(config(), images, [ONE], cluster, 80_000)
    assert [p.lr for p in fixed] == [0.1, 0.1]
    assert "scale_lr=none leaves the rate at 0.1; linear scaling would make it 0.2" in fixed[1].notes["lr"]
    assert "global batch 1600 is 2 times the recipe's 800" in fixed[1].notes["batch"]
    big = points(config(), shares(config(), [16], 8, 1, strong=False), [ONE], cluster, 80_000)
    assert "beyond 8192 images SGD lost accuracy" in big[0].notes["sgd"]


def test_strong_scaling_keeps_the_batch_until_it_no_longer_divides() -> None:
    images = shares(config(), [1, 4, 100, 3, 200], 8, 1, strong=True)
    assert images == {1: 100, 4: 25, 100: 1, 3: None, 200: None}
    found = points(config(), images, [ONE], Cluster(gpus=8, link=FREE), 80_000)
    assert [p.global_batch for p in found] == [800, 800, 800, None, None]
    assert found[1].step == pytest.approx(0.150 / 4) and found[1].of_one == pytest.approx(1)
    assert "1 images a GPU: BatchNorm" in found[2].notes["images"] and found[2].lr == 0.1
    assert found[3].notes == {IMPOSSIBLE: "global_batch_size=800 does not divide among 24 ranks"}
    assert found[4].notes[IMPOSSIBLE].endswith("does not divide among 1600 ranks: less than an image each")
    with pytest.raises(ConfigError, match="does not divide among 24 ranks: say with --base-nodes"):
        shares(config(), [1], 8, 3, strong=False)
    # A batch larger than the training set is no step at all.
    (beyond,) = points(config(), {8: 100}, [ONE], Cluster(gpus=8, link=FREE), 3000)
    assert "is more than the 3000" in beyond.notes[IMPOSSIBLE] and beyond.step is None


def test_a_batch_between_measured_ones_is_on_their_line() -> None:
    small = ONE.scaled(20, 0.070 / 0.150)
    assert at([ONE, small], 20) is small
    assert at([ONE, small], 60).step == pytest.approx(0.110) and at([ONE, small], 10).step == pytest.approx(0.060)
    half = at([ONE], 50)
    assert (half.step, half.backward, half.buckets[1].ready) == pytest.approx((0.075, 0.050, 0.035))
    assert half.buckets[1].bytes == 10_000_000


def test_more_nodes_stop_paying_where_the_added_ones_bring_less_than_asked() -> None:
    slow = Cluster(gpus=8, link=replace(FREE, net_gbit=1, net_hop_us=1000))
    images = shares(config(), [1, 2, 4, 8, 16], 8, 1, strong=True)
    found = points(config(), images, [ONE], slow, 80_000)
    last = scaling.last_worth(found, 0.5)
    assert last is not None and found[found.index(last) + 1].marginal < 0.5 <= (last.marginal or 1)
    assert scaling.last_worth(found, -1e9) is None
    halved = points(config(), images, [ONE], replace(slow, bf16=True), 80_000)
    assert halved[1].exposed < found[1].exposed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", [1]),
        ("1,2,4,...,128", [1, 2, 4, 8, 16, 32, 64, 128]),
        ("2, 4, ..., 9", [2, 4, 8, 9]),
        ("4,8,12,...,20", [4, 8, 12, 16, 20]),
    ],
)
def test_numbers_of_nodes(text: str, expected: list[int]) -> None:
    assert powers(text) == expected


# The command


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    (tmp_path / "c.yaml").write_text("{global_batch_size: 800, data: {source: synthetic}}")
    timeline.write(tmp_path / "one.json", [ONE])
    assert timeline.read(tmp_path / "one.json") == [ONE]
    return [str(tmp_path / "c.yaml"), "--measured", str(tmp_path / "one.json")]


def test_the_command_prints_a_table_or_json(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *given, "--nodes", "1,2,4,...,16", "--link", "100", "optim.scale_lr=linear"]) == 0
    shown = capsys.readouterr().out
    assert "one GPU (a GPU): 100 images in 150 ms, backward 100 ms; buckets ready: 10.0 MB at 40" in shown
    rows = [line.split() for line in shown.splitlines() if line.strip()[:1].isdigit() and "nodes:" not in line]
    assert [row[:4] for row in rows] == [
        [str(n), str(8 * n), "100", str(800 * n)] for n in (1, 2, 4, 8, 16)
    ] and "weak scaling" in shown
    assert shown.count("times the recipe's") == 1
    assert "from 2 nodes: global batch 1600 is 2 times the recipe's 800" in shown
    flags = ["--strong", "--nodes", "1,2,3", "--json", "distributed.gradients=bf16"]
    assert main(["plan", *given, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scaling"] == "strong" and found["gradients"] == "bf16"
    assert [p["images"] for p in found["points"]] == [100, 50, None] and found["points"][2]["step"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", "2,1"], "--nodes 2,1: write rising whole numbers"),
        (["--nodes", "two"], "--nodes two: write rising whole numbers"),
        (["--nodes", "1,...,8"], "--nodes 1,...,8: write rising"),
        (["--nodes", "0,1"], "--nodes 0,1: write rising"),
        (["--link", "fast"], "--link fast: write Gb/s a GPU"),
        (["--link", "-3"], "--link -3: write Gb/s above 0"),
        (["--link", "100/rack"], "--link 100/rack: write Gb/s above 0, of a GPU"),
        (["--link", "LINK"], "net_gbit=0.0 is too small; it must be above 0"),
        (["--gpus-per-node", "0"], "--gpus-per-node 0: use 1 or more"),
        (["--gpus-per-node", "7"], "global_batch_size=800 does not divide among 7 ranks: say with --base-nodes"),
        (["--worth", "2"], "--worth 2: use a share"),
        (["--step-ms", "9"], "--measured has the step already"),
        (["--backward-ms", "9"], "--backward-ms 9 is a part of --step-ms"),
        (["--measured", "nowhere.json"], "nowhere.json: not a file of timelines"),
        (["model.nam=x"], "there is no option model.nam"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "link.yaml").write_text("net_gbit: 0")
    words = [str(tmp_path / "link.yaml") if word == "LINK" else word for word in flags]
    assert main(["plan", *given, *words]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
