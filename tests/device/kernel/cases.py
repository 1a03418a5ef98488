"""Cases for the kernel: every rule with every kind of row layout, padding and id type, and random ones."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sglang_eplb_affinity.device.launch_shape import LaunchShape, LaunchShapes
from tests.device.kernel.random_case import Case

RULES = (None, "static", "dynamic", "cover", "cover_balanced")
UNEVEN = ((5, 2), (0, 3), (17, 0), (9, 1))


def _random(seed: int) -> Case:
    random = np.random.default_rng(seed)
    gpus, nodes = [(1, 1), (2, 1), (8, 1), (8, 2), (16, 4)][random.integers(5)]
    experts = int(random.integers(2, 70))
    k = int(random.integers(1, min(experts, 9) + 1))
    rows = int(random.integers(1, 60))
    return Case(
        rule=("dynamic", "cover", "cover_balanced")[seed % 3],
        gpus=gpus,
        nodes=nodes,
        experts=experts,
        redundant=-experts % gpus + gpus * int(random.integers(0, 3)),
        hot=int(random.integers(2, 40)),
        k=k,
        groups=((rows, int(random.integers(0, 9))),),
        source=None if random.random() < 0.3 else int(random.integers(gpus)),
        valid=bool(random.random() < 0.5),
        dtype=torch.int64 if random.random() < 0.5 else torch.int32,
        seed=seed,
    )


def _cover(gpus: int, nodes: int, redundant: int, k: int, **more: Any) -> Case:
    """At most four replicas of an expert, so that rows are chosen from in registers."""
    return Case("cover", gpus=gpus, nodes=nodes, redundant=redundant, hot=24, most_replicas=4, k=k, layers=1, **more)


COVER_CASES = [
    _cover(4, 2, 8, 8, dtype=torch.int64),
    _cover(8, 8, 16, 6, source=None, valid=True),  # a GPU per node
    _cover(12, 4, 12, 4, experts=60, source=7),  # 3 GPUs per node: codes leave gaps
    _cover(32, 4, 32, 8, experts=96, groups=((40, 0), (7, 33)), source=31),  # two programs, the second not full
    _cover(72, 1, 20, 6, experts=124, source=70),
    _cover(72, 18, 20, 4, experts=124, source=None),
    _cover(144, 2, 44, 4, experts=100, source=143),  # 16 bits for a GPU from here on
    _cover(320, 40, 64, 6, experts=256, source=250, valid=True),
    _cover(2, 1, 30, 4, experts=10),  # replicas of one expert on one GPU
    Case("cover", redundant=40, k=6, layers=1),  # loops: more replicas than are read ahead
    Case("cover", gpus=8, redundant=40, hot=6, layers=1, source=None, groups=((66, 4),)),  # in one program, not in all
    Case("cover", redundant=0, layers=1),
]
BALANCED_CASES = [replace(case, rule="cover_balanced", groups=((45, 3),)) for case in COVER_CASES]
TWO_LAUNCHES = LaunchShapes(LaunchShape(32, 1, lanes=True), LaunchShape(64, 2, count_in_program=True), many_items=400)
ROWS = LaunchShapes(LaunchShape(32, 1), LaunchShape(32, 1))
ONE_WARP = LaunchShapes(LaunchShape(32, 1), LaunchShape(64, 2, count_in_program=True), many_items=100)
CASES = (
    [Case(rule) for rule in RULES]
    + [Case(rule, valid=True, dtype=torch.int64, extra_columns=1) for rule in RULES]
    + [Case(rule, source=None, groups=((4, 2), (6, 0), (0, 6))) for rule in RULES]
    + [replace(Case(rule, source=None, groups=UNEVEN), even=False) for rule in RULES]
    + [Case(rule, record=False) for rule in RULES[1:]]
    + [Case(rule, groups=((70, 5),), k=6) for rule in RULES]  # more tokens than can be sampled; k padded to 8
    + [Case(rule, groups=((2100, 9),), k=8, experts=40, redundant=8, layers=1) for rule in RULES]  # added up in blocks
    + [
        Case("dynamic", redundant=40),
        Case("dynamic", redundant=20, hot=20, most_replicas=3, k=8),
    ]  # more and fewer than are read ahead
    + COVER_CASES
    + [replace(case, shapes=ROWS) for case in COVER_CASES]
    + BALANCED_CASES
    + [replace(case, shapes=ROWS) for case in BALANCED_CASES[:4]]
    + [replace(case, shapes=TWO_LAUNCHES, groups=((tokens, 3),)) for case in BALANCED_CASES for tokens in (12, 90)]
    + [Case(rule, shapes=ONE_WARP, groups=((tokens, 5),), layers=1) for rule in RULES for tokens in (12, 70)]
    + [Case("cover", gpus=1, nodes=1, k=1), Case("dynamic", redundant=0)]
    + [Case(rule, zero_experts=12, k=6) for rule in RULES]
    + [Case(rule, first_token=12, groups=((8, 5),)) for rule in RULES]  # others have the first tokens of the pass
    + [_random(seed) for seed in range(24)]
)
