"""Words of the cover kernel: GPU codes that cannot be mistaken, and the choice of a candidate."""

import pytest

from sglang_eplb_affinity.device.cover_words import READ_AHEAD, GpuCodes, choice_word
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology

TOPOLOGIES = [
    (1, 1),
    (8, 1),
    (8, 8),
    (12, 4),
    (32, 4),
    (72, 1),
    (120, 15),
    (126, 1),
    (127, 1),
    (144, 2),
    (320, 40),
    (320, 320),
]


@pytest.mark.parametrize("gpus, nodes", TOPOLOGIES)
def test_codes_tell_gpus_and_nodes_apart_and_from_nowhere(gpus: int, nodes: int) -> None:
    codes = GpuCodes.of(Topology(gpus, nodes))
    per_node = gpus // nodes
    of_gpu = [gpu + gpu // per_node * (codes.node_step - per_node) for gpu in range(gpus)]
    nowhere = (1 << (codes.field_bits - 1)) - 2
    assert len({*of_gpu, nowhere}) == gpus + 1
    assert max(of_gpu) < 1 << (codes.field_bits - 1)
    assert [code // codes.node_step for code in of_gpu] == [gpu // per_node for gpu in range(gpus)]
    if nodes > 1:
        assert nowhere // codes.node_step >= nodes


def test_bytes_hold_the_codes_of_most_clusters() -> None:
    assert [GpuCodes.of(Topology(gpus, nodes)).field_bits for gpus, nodes in [(72, 1), (120, 15), (128, 16)]] == [
        8,
        8,
        16,
    ]


def test_more_gpus_than_can_be_numbered_are_refused() -> None:
    with pytest.raises(InputError, match="40000 GPUs"):
        GpuCodes.of(Topology(40000, 1))


def test_every_candidate_of_every_mask_is_chosen_once() -> None:
    for mask in range(1, 1 << READ_AHEAD):
        bits = [bit for bit in range(READ_AHEAD) if mask >> bit & 1]
        chosen = [choice_word(len(bits), number) >> 2 * mask & 3 for number in range(len(bits))]
        assert chosen == bits
        others = [choice_word(size, 0) >> 2 * mask & 3 for size in range(1, READ_AHEAD + 1) if size != len(bits)]
        assert others == [0] * len(others)  # so that words of all sizes can be joined by `or`
