"""What an all-reduce costs: a model of the links within a node and between nodes.

S bytes, n nodes of g GPUs, hierarchical: a reduce-scatter within each node, an all-reduce of every GPU's S/g among its
like in the other nodes, an all-gather within each node; with B the bytes a second that a GPU sends, a the seconds of a
hop, both for the link in question:

    within     2 (g-1) a + 2 (g-1)/g S/B                      a ring's two halves
    between    2 (n-1) a + 2 (n-1)/n (S/g)/B                  a ring of n, or
               2 ceil(log2 n) a + 2 (S/g)/B                   NCCL's double binary tree: the quicker of the two
    in all     start + within + between

NCCL splits GPUs over rails like that where there is a network card for each; where all GPUs of a node share one, B is
the card's divided by g. Hops and start are NCCL's own constants for its Simple protocol (NVIDIA/nccl,
src/graph/tuning.cc: 8.4 us, 3.4 us a hop of NVLink, 14 us one of the network, ring or tree). The rates are assumptions:
NVLink 4 as 300 GB/s of 450, a network card as 0.9 of its line rate. None of it was measured here; what was measured is
in benchmarks/README.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from trainer import configfile
from trainer.mistakes import ConfigError, at_least, share


@dataclass(frozen=True, kw_only=True)
class Link:
    """The options of a link profile, a YAML file."""

    net_gbit: float = 400.0  # line rate between nodes, Gb/s
    net_per_node: bool = False  # all GPUs of a node share it; False: each has that much
    net_share: float = 0.9  # of the line rate that is left for data
    net_hop_us: float = 14.0
    node_gb_s: float = 300.0  # within a node, what each GPU sends, GB/s
    node_hop_us: float = 3.4
    start_us: float = 8.4  # of each all-reduce
    # Of the processor that computes, what a reduction takes while it lasts. gloo's runs on the cores of the backward
    # pass: near 1. NCCL's takes a few of a GPU's multiprocessors: not measured.
    steal: float = 0.0

    def __post_init__(self) -> None:
        for key in ("net_gbit", "node_gb_s", "net_share"):
            at_least(key, getattr(self, key), 0, strictly=True)
        for key in ("net_hop_us", "node_hop_us", "start_us"):
            at_least(key, getattr(self, key), 0)
        share("net_share", self.net_share)
        share("steal", self.steal)

    def seconds(self, size: int, nodes: int, gpus: int) -> float:
        """Of an all-reduce of `size` bytes over `nodes` nodes of `gpus` GPUs, alone on the links; 0 for one GPU."""
        if nodes * gpus == 1:
            return 0.0
        rate = self.net_gbit * 1e9 / 8 * self.net_share / (gpus if self.net_per_node else 1)
        hop, mine = self.net_hop_us / 1e6, size / gpus
        ring = 2 * (nodes - 1) * hop + 2 * (nodes - 1) / nodes * mine / rate
        tree = 2 * math.ceil(math.log2(nodes)) * hop + (2 * mine / rate if nodes > 1 else 0.0)
        within = 2 * (gpus - 1) * self.node_hop_us / 1e6 + 2 * (gpus - 1) / gpus * size / (self.node_gb_s * 1e9)
        return self.start_us / 1e6 + within + min(ring, tree)

    def __str__(self) -> str:
        whose = "a node" if self.net_per_node else "a GPU"
        return (
            f"{self.node_gb_s:g} GB/s a GPU within a node, {self.net_gbit:g} Gb/s x {self.net_share:g} {whose} "
            f"between, hops {self.node_hop_us:g} and {self.net_hop_us:g} us"
        )


def of(text: str) -> Link:
    """The link that `--link` names: Gb/s a GPU (400), a node (400/node), or a profile's file.

    Raises:
        ConfigError: it is none of these, or the profile makes no sense.
    """
    number, _, whose = text.partition("/")
    try:
        rate = float(number)
    except ValueError:
        if not Path(text).is_file():
            raise ConfigError(
                f"--link {text}: write Gb/s a GPU (400), Gb/s a node (400/node), or a YAML file of the options in "
                "launch/link.py"
            ) from None
        return _read(text)
    if whose not in ("", "gpu", "node") or not 0 < rate < math.inf:
        raise ConfigError(f"--link {text}: write Gb/s above 0, of a GPU (400) or a node (400/node)")
    return Link(net_gbit=rate, net_per_node=whose == "node")


def _read(path: str) -> Link:
    try:
        return configfile.load_as(Link, path)
    except ConfigError as error:
        raise ConfigError(str(error) if path in str(error) else f"{path}: {error}") from error
