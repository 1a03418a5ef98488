"""Time of a layer's experts on each GPU, from the tokens of its slots.

Two grouped products (gate and up, then down). Those of decode (DeepGEMM's masked layout, as in low-latency mode) go in
waves of one tile an SM:

    alone  = waves * (time of a wave whatever its size + a tile's weights / an SM's memory rate, or its products)
    shared = (weights of the active slots + rows in and out) / memory rate
    time   = both, joined by a power sum

A tile has 64 or 128 rows of one slot and as many columns as give the fewest waves and, of those, the fullest last one,
for the rows of a slot on average and all slots of the GPU, active or not: as DeepGEMM chooses (its heuristics). So a
slot more costs its weights, or, where it begins another wave, that: 9 slots instead of 8 take 17 to 34 % longer for
experts of 4096 x 1536. Constants were fitted to products of three shapes on an H200 (results/decode/expert-slots*.json;
``python -m bench.calibration.expert_fit``; ``python -m bench.capacity experts`` compares); other GPUs are assumed to
reach the same shares of their peaks.

Those of prefill (contiguous layout) have many rows a slot and wait for multiplying: a roofline of reading against
multiplying in waves, joined by a power sum, its constants from masked products of DeepSeek-V3's experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sglang_eplb_affinity.simulate.system import Gpu, Model

SMS = 132  # of H100, H200 and H800
SMALL_TILE_ROWS, TILE_ROWS = (
    64,
    128,
)  # prefill: a slot's rows are padded to these, the first where slots have so few on average
MEMORY_SHARE = 0.90
LAST_WAVE = 0.65  # of a wave's weights: the last wave leaves SMs idle, in reading too
WAVE_COLUMNS = 128  # of a tile's weights
LAUNCH_US = 10.0
ACTIVATION_US = 4.0  # between the products, and quantisation: assumed, not in the measurement
ROOFLINE_POWER = 6.0


@dataclass(frozen=True)
class Products:
    """Of one type of weights: achieved share of the peak, columns of a tile of the two products."""

    compute_share: float
    up_columns: int
    down_columns: int


BF16 = Products(0.72, 256, 192)
FP8 = Products(0.60, 128, 128)


def products_us(slot_rows: np.ndarray, model: Model, gpu: Gpu) -> np.ndarray:
    """float64 [gpus]: us of both products for float64 rows [gpus, slots]; a slot with less than half a row is idle."""
    rows = np.where(slot_rows >= 0.5, slot_rows, 0.0)
    active = (rows > 0).sum(1)
    total = rows.sum(1)
    tile = np.where(total <= SMALL_TILE_ROWS * active, SMALL_TILE_ROWS, TILE_ROWS)
    row_tiles = np.ceil(np.round(rows / tile[:, None], 6)).sum(1)
    of = FP8 if model.expert_bytes_per_weight <= 1 else BF16
    us = np.full(len(rows), LAUNCH_US)
    for width, depth, columns in (
        (2 * model.intermediate, model.hidden, of.up_columns), (model.hidden, model.intermediate, of.down_columns)
    ):  # fmt: skip
        weights = active * width * depth * model.expert_bytes_per_weight
        wave = SMS * WAVE_COLUMNS * depth * model.expert_bytes_per_weight
        values = total * (depth * model.expert_bytes_per_weight + 2 * width)
        read = (weights + LAST_WAVE * np.minimum(wave, weights) + values) / (gpu.hbm_gb_per_s * MEMORY_SHARE * 1e3)
        waves = np.ceil(row_tiles * -(-width // columns) / SMS)
        multiply = waves * SMS * tile * columns * depth * 2 / (gpu.expert_tflops * of.compute_share * 1e6)
        us += (read**ROOFLINE_POWER + multiply**ROOFLINE_POWER) ** (1 / ROOFLINE_POWER)
    return us


@dataclass(frozen=True)
class MaskedProducts:
    """Of one type of weights: achieved shares of the peaks (``sm_share``: of a 132nd of the memory rate, by an SM that
    others do not hinder), most columns of a tile, us of a wave of tiles of 64 and of 128 rows, and of the launches."""

    memory_share: float
    sm_share: float
    compute_share: float
    most_columns: int
    wave_us: tuple[float, float]
    launch_us: float
    power: float


MASKED_BF16 = MaskedProducts(0.811, 2.0, 0.795, 256, (9.7, 4.7), 4.0, 8.0)
MASKED_FP8 = MaskedProducts(0.98, 1.6, 0.78, 192, (2.5, 2.1), 6.0, 2.0)
_TILE_POWER = 8.0


@lru_cache(maxsize=4096)
def masked_tile(rows: int, width: int, slots: int, most_columns: int) -> tuple[int, int]:
    """(rows, columns) of a tile for ``rows`` of a slot on average, a product of ``width`` columns, and ``slots``."""

    def order(tile: tuple[int, int]) -> tuple[int, int, int, int]:
        tiles = -(-rows // tile[0]) * -(-width // tile[1]) * slots
        return (-(-tiles // SMS), -(tiles % SMS or SMS), *tile)

    return min(((r, c) for r in (64, 128) for c in range(16, most_columns + 1, 16)), key=order)


def masked_products_us(
    slot_rows: np.ndarray, model: Model, gpu: Gpu, constants: MaskedProducts | None = None
) -> np.ndarray:
    """As :func:`products_us`, in the masked layout. ``constants``: others than the type's own."""
    rows = np.where(slot_rows >= 0.5, slot_rows, 0.0)
    active, total = (rows > 0).sum(1), rows.sum(1)
    each, bytes_of = model.expert_bytes_per_weight, gpu.hbm_gb_per_s * 1e3
    of = constants or (MASKED_FP8 if each <= 1 else MASKED_BF16)
    expected = np.maximum(1, total // np.maximum(active, 1)).astype(int)
    us = np.full(len(rows), of.launch_us)
    for width, depth in ((2 * model.intermediate, model.hidden), (model.hidden, model.intermediate)):
        tile = np.array([masked_tile(int(e), width, rows.shape[1], of.most_columns) for e in expected])
        tiles = np.ceil(np.round(rows / tile[:, :1], 6)).sum(1) * -(-width // tile[:, 1])
        read = tile[:, 1] * depth * each / (bytes_of / SMS * of.sm_share)
        multiply = tile[:, 0] * tile[:, 1] * depth * 2 * SMS / (gpu.expert_tflops * of.compute_share * 1e6)
        wave = np.where(tile[:, 0] > 64, of.wave_us[1], of.wave_us[0])
        alone = np.ceil(tiles / SMS) * (wave + (read**_TILE_POWER + multiply**_TILE_POWER) ** (1 / _TILE_POWER))
        values = active * width * depth * each + total * (depth * each + 2 * width)
        shared = values / (bytes_of * of.memory_share)
        us += (alone**of.power + shared**of.power) ** (1 / of.power)
    return us


def experts_us(slot_rows: np.ndarray, model: Model, gpu: Gpu, masked: bool) -> np.ndarray:
    """float64 [gpus]: the products with what lies between them; ``masked``: of decode."""
    return (masked_products_us if masked else products_us)(slot_rows, model, gpu) + ACTIVATION_US


def active_slots(slot_rows: np.ndarray) -> np.ndarray:
    """int64 [gpus]: slots that have tokens, of rows [gpus, slots]."""
    return np.asarray((slot_rows >= 0.5).sum(1))
