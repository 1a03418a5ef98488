"""The cost of imbalance, beside the hard cap: what a GPU's load does on tokens that were not planned on.

A cap alone lets many GPUs sit at the cap, and experts that fire together rise and fall together, so their common GPU
overshoots on later tokens. The objective therefore has smooth terms: the squared load of each GPU over the whole
window, its squared deviation in blocks of the token sample, and its squared deviation in the windows before this one. A
server's sample is in random order, so its blocks show the chance of single tokens; what topics do to load only shows
from window to window. On recorded traces the terms buy the same load on unseen tokens as a tighter cap at clearly
smaller fan-out; docs/planner.md has the measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

BLOCKS = 32
SHIFT = 24  # imbalance cost = squares * sampled tokens >> SHIFT


@dataclass(frozen=True)
class ImbalanceWeights:
    """Copies to another GPU, per token and divided by k, that the squared relative deviation of a GPU's load is worth.

    ``window``: over the whole window, above EPLB's most loaded GPU less ``margin`` (in mean GPU loads). ``blocks``:
    mean over blocks of the token sample. ``earlier``: mean over the windows before.
    """

    window: float
    blocks: float
    margin: float = 0.2
    earlier: float = 0.0


@dataclass(frozen=True)
class Imbalance:
    """Integer inputs of the searches: ``profile`` int32 [experts, BLOCKS + windows before] and a load's factor."""

    profile: np.ndarray
    load_free: int  # load of a GPU that costs nothing yet
    load_scale: int
    noise: float  # standard error of a GPU's load over the window, relative to the mean GPU


def imbalance(
    tokens: np.ndarray, counts: np.ndarray, eplb_load: float, num_gpus: int, cost_unit: int, weights: ImbalanceWeights,
    earlier: np.ndarray | None = None,
) -> Imbalance:  # fmt: skip
    """From tokens int16 [T, k] in order of time and counts int64 [experts]; ``eplb_load``: EPLB's most loaded GPU.

    ``earlier`` float [windows, experts]: each expert's share of its window's assignments, in windows before.
    """
    total = len(tokens)
    experts = len(counts)
    blocks = min(BLOCKS, max(total // 16, 1))
    block = np.arange(total) * blocks // total
    used = tokens >= 0
    flat = (block[:, None] * experts + np.where(used, tokens, 0))[used]
    by_block = np.bincount(flat, minlength=blocks * experts).reshape(blocks, experts).astype(np.float64)
    mean_gpu = np.maximum(by_block.sum(1, keepdims=True) / num_gpus, 1.0)
    deviation = (by_block / mean_gpu - by_block.sum(0) / mean_gpu.sum()).T
    unit = cost_unit / num_gpus * (1 << SHIFT) / max(tokens.shape[1], 1)
    profile = np.zeros((experts, BLOCKS), np.int32)
    profile[:, :blocks] = np.rint(deviation * math.sqrt(weights.blocks * unit / blocks)).astype(np.int32)
    shares = np.empty((0, experts)) if earlier is None else earlier[earlier.any(1)]
    if weights.earlier and len(shares):
        shift = (shares - counts / counts.sum()).T * num_gpus  # in mean GPU loads, as ``deviation``
        columns = np.rint(shift * math.sqrt(weights.earlier * unit / len(shares))).astype(np.int32)
        profile = np.concatenate([profile, columns], 1)
    load_scale = math.sqrt(weights.window * unit) / (counts.sum() / num_gpus)
    # An average GPU holds experts / num_gpus experts; their deviations add up as if independent.
    variance = float((deviation**2).mean(1).sum() / num_gpus / blocks)
    load_free = int(eplb_load - weights.margin * counts.sum() / num_gpus)
    return Imbalance(profile, load_free, round(load_scale * (1 << 20)), math.sqrt(variance))
