"""What the searches take, in groups; named tuples, which compiled code reads as fast as single arguments."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Grid(NamedTuple):
    """How slots are spread: slot s is on GPU s // slots_per_gpu, GPU g on node g // gpus_per_node."""

    slots_per_gpu: int
    gpus_per_node: int
    num_nodes: int


class Items(NamedTuple):
    """What swap_search.py places: tokens int16 [T, k] of items; their sets as bits uint64 [items, words] and as members
    int64 from start int64 [items + 1] on; expert int32 [items]; load int64 [items]."""

    tokens: np.ndarray
    bits: np.ndarray
    start: np.ndarray
    members: np.ndarray
    expert: np.ndarray
    load: np.ndarray


class Costs(NamedTuple):
    """Integer costs: a token's copy to a GPU and to a node, an expert's copy to a node (low latency), a move."""

    gpu: int
    node: int
    spread: int
    move: int


class Balance(NamedTuple):
    """What a GPU's load may be and costs; loads as in the counts of the window.

    No GPU may be loaded over ``cap``. Above ``free`` a load times ``scale`` / 2**20 costs its square, and so do the
    sums of the columns of profile int32 [experts or items, columns] (load by block of time), all times ``weight`` >>
    SHIFT.
    """

    cap: int
    free: int
    scale: int
    profile: np.ndarray
    weight: int


class Moves(NamedTuple):
    """home uint8 [experts, gpus]: 1 where an expert costs no move; at most ``most`` experts new to each GPU.

    ``unit``: GPUs of what may be lost (0: nothing); an expert on two such units at the start stays on two.
    """

    home: np.ndarray
    most: int
    unit: int


class Steps(NamedTuple):
    """As of random_steps.schedule, one stage a temperature; proposals per stage; the seed of the proposals."""

    temperatures: np.ndarray
    neg_log: np.ndarray
    per_stage: int
    seed: int
