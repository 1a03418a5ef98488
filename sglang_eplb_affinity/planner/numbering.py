"""GPUs numbered anew for each sampled token, so that a bitmask of GPUs says which replica wins a tie: its lowest bit.

Over 64 GPUs a mask has several words, the lowest first.

Seen from the token's source GPU (sampled tokens are dealt to the GPUs in turn) it comes first, then the others of its
node, then the other nodes, as the rule ``cover`` prefers them. What the rule leaves to a hash is left to the order:
every source has several, random ones and their reverses, so that no replica is preferred over all tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

WORD = 64  # bits of a word of a mask
CLASSES = 128


class Numbering(NamedTuple):
    """A class of tokens has one source GPU and one order; token t is of class t modulo classes.

    bit int16 [gpus, classes]: each GPU's bit. gpu int16 [classes, gpus]: the GPU of each bit. node_masks uint64 [nodes,
    words]: the bits of each node; leaders uint64 [words]: one bit of every node.
    """

    bit: np.ndarray
    gpu: np.ndarray
    node_masks: np.ndarray
    leaders: np.ndarray

    @property
    def classes(self) -> int:
        return len(self.gpu)


@lru_cache(maxsize=8)
def numbering(num_gpus: int, num_nodes: int) -> Numbering:
    """The same on every machine."""
    per_node = num_gpus // num_nodes
    classes = num_gpus * max(4, CLASSES // num_gpus // 2 * 2)
    bit = np.zeros((num_gpus, classes), np.int16)
    gpu = np.zeros((classes, num_gpus), np.int16)
    for of_class in range(classes):
        source, order = of_class % num_gpus, of_class // num_gpus
        home, own = divmod(source, per_node)
        draw = np.random.default_rng([order // 2, source])
        nodes, inside = draw.permutation(num_nodes).tolist(), draw.permutation(per_node).tolist()
        if order % 2:
            nodes, inside = nodes[::-1], inside[::-1]
        sequence = [source, *(home * per_node + i for i in inside if i != own)]
        sequence += [node * per_node + i for node in nodes if node != home for i in inside]
        gpu[of_class] = sequence
        bit[sequence, of_class] = np.arange(num_gpus)
    words = -(-num_gpus // WORD)
    masks = np.zeros((num_nodes, words), np.uint64)
    for at in range(num_gpus):
        masks[at // per_node, at // WORD] |= np.uint64(1 << at % WORD)
    leaders = np.zeros(words, np.uint64)
    for at in range(0, num_gpus, per_node):
        leaders[at // WORD] |= np.uint64(1 << at % WORD)
    return Numbering(bit, gpu, masks, leaders)
