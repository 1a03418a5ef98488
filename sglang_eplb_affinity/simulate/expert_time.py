"""Time of a layer's experts on each GPU, from the tokens of its slots.

Two grouped products (gate and up, then down), each a roofline of reading against multiplying, joined by a power sum:

    read     = (weights of the active slots + LAST_WAVE * weights of one wave + rows in and out) / memory rate
    multiply = waves * one tile on every SM / compute rate
    waves    = tiles of all active slots / SMs, rounded up

A GPU works on tiles in waves of one an SM. A slot with one row more than its tiles hold costs a tile more, and tiles
beyond whole waves a wave: that is where a slot costs more than its weights. The last wave leaves SMs idle, in reading
too. Constants were fitted to DeepGEMM's masked products on an H200 (results/decode/expert-slots-h200.json;
``python -m bench.capacity experts`` compares); other GPUs are assumed to reach the same shares of their peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.simulate.system import Gpu, Model

SMS = 132  # of H100, H200 and H800
SMALL_TILE_ROWS, TILE_ROWS = 64, 128  # a slot's rows are padded to these: the first where slots have so few on average
MEMORY_SHARE = 0.90
LAST_WAVE = 0.65
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


def experts_us(slot_rows: np.ndarray, model: Model, gpu: Gpu) -> np.ndarray:
    """float64 [gpus]: the same with what lies between the products."""
    return products_us(slot_rows, model, gpu) + ACTIVATION_US


def active_slots(slot_rows: np.ndarray) -> np.ndarray:
    """int64 [gpus]: slots that have tokens, of rows [gpus, slots]."""
    return np.asarray((slot_rows >= 0.5).sum(1))
