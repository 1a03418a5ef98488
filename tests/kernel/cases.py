"""Cases for the kernel: every rule with every kind of row layout, padding and id type, and random ones."""

from dataclasses import replace

import numpy as np
import torch

from tests.kernel.random_case import Case

RULES = (None, "static", "dynamic", "cover")
UNEVEN = ((5, 2), (0, 3), (17, 0), (9, 1))


def _random(seed: int) -> Case:
    random = np.random.default_rng(seed)
    gpus, nodes = [(1, 1), (2, 1), (8, 1), (8, 2), (16, 4)][random.integers(5)]
    experts = int(random.integers(2, 70))
    k = int(random.integers(1, min(experts, 9) + 1))
    rows = int(random.integers(1, 60))
    return Case(
        rule=("dynamic", "cover")[seed % 2],
        gpus=gpus,
        nodes=nodes,
        experts=experts,
        redundant=-experts % gpus + gpus * int(random.integers(0, 3)),
        k=k,
        groups=((rows, int(random.integers(0, 9))),),
        source=None if random.random() < 0.3 else int(random.integers(gpus)),
        valid=bool(random.random() < 0.5),
        dtype=torch.int64 if random.random() < 0.5 else torch.int32,
        seed=seed,
    )


CASES = (
    [Case(rule) for rule in RULES]
    + [Case(rule, valid=True, dtype=torch.int64, extra_columns=1) for rule in RULES]
    + [Case(rule, source=None, groups=((4, 2), (6, 0), (0, 6))) for rule in RULES]
    + [replace(Case(rule, source=None, groups=UNEVEN), even=False) for rule in RULES]
    + [Case(rule, record=False) for rule in RULES[1:]]
    + [Case(rule, groups=((70, 5),), k=6) for rule in RULES]  # more tokens than can be sampled; k padded to 8
    + [Case(rule, groups=((2100, 9),), k=8, experts=40, redundant=8, layers=1) for rule in RULES]  # added up in blocks
    + [Case("cover", redundant=40)]  # more replicas than are read ahead
    + [Case("cover", gpus=1, nodes=1, k=1), Case("dynamic", redundant=0)]
    + [_random(seed) for seed in range(24)]
)
