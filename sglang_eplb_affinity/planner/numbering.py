"""GPUs numbered anew for each sampled token, so that a bitmask of GPUs says which replica wins a tie: its lowest bit.

Seen from the token's source GPU (sampled tokens are dealt to the GPUs in turn) it comes first, then the others of its
node, then the other nodes, as the rule ``cover`` prefers them. What the rule leaves to a hash is left to the order:
every source has several, random ones and their reverses, so that no replica is preferred over all tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

MOST_GPUS = 64  # bits of a mask
CLASSES = 128


class Numbering(NamedTuple):
    """A class of tokens has one source GPU and one order; token t is of class t modulo classes.

    bit uint64 [classes, gpus]: each GPU's bit. gpu int64 [classes, 65]: the GPU of each bit. node_masks uint64 [nodes]:
    the bits of each node; leaders uint64: one bit of every node.
    """

    bit: np.ndarray
    gpu: np.ndarray
    node_masks: np.ndarray
    leaders: np.uint64


@lru_cache(maxsize=8)
def numbering(num_gpus: int, num_nodes: int) -> Numbering:
    """For at most ``MOST_GPUS`` GPUs; the same on every machine."""
    per_node = num_gpus // num_nodes
    classes = num_gpus * max(4, CLASSES // num_gpus // 2 * 2)
    bit = np.zeros((classes, num_gpus), np.uint64)
    gpu = np.zeros((classes, 65), np.int64)
    for of_class in range(classes):
        source, order = of_class % num_gpus, of_class // num_gpus
        home, own = divmod(source, per_node)
        draw = np.random.default_rng([order // 2, source])
        nodes, inside = draw.permutation(num_nodes).tolist(), draw.permutation(per_node).tolist()
        if order % 2:
            nodes, inside = nodes[::-1], inside[::-1]
        sequence = [source, *(home * per_node + i for i in inside if i != own)]
        sequence += [node * per_node + i for node in nodes if node != home for i in inside]
        gpu[of_class, :num_gpus] = sequence
        bit[of_class, sequence] = np.uint64(1) << np.arange(num_gpus, dtype=np.uint64)
    masks = [((1 << per_node) - 1) << node * per_node for node in range(num_nodes)]
    leaders = sum(1 << node * per_node for node in range(num_nodes))
    return Numbering(bit, gpu, np.array(masks, np.uint64), np.uint64(leaders))
