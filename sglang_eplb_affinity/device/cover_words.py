"""Words that the rule `cover` works with in map_and_record_kernel.py: several small numbers in one register."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology

READ_AHEAD = 4  # replicas that are chosen from in registers; where an expert has more, loops over all of them do it


@dataclass(frozen=True)
class GpuCodes:
    """How four GPUs share a word: fields of ``field_bits``, numbers in which a node begins at each ``node_step``.

    The top bit of a field is for carries. The largest even number below it means "nowhere", so its node is no real one.
    """

    field_bits: int
    node_step: int

    @staticmethod
    def of(topology: Topology) -> GpuCodes:
        """8 bits up to about 120 GPUs, else 16; raises InputError for more than 16 bits hold."""
        step = 1 << (topology.gpus_per_node - 1).bit_length()
        for bits in (8, 16):
            nowhere = (1 << (bits - 1)) - 2
            one_node_fits = topology.num_nodes == 1 and topology.num_gpus <= nowhere  # nodes are not compared
            if one_node_fits or topology.num_nodes <= nowhere // step:
                return GpuCodes(bits, step)
        raise InputError(f"dispatch rule 'cover': {topology.num_gpus} GPUs are more than the kernel can number")


def every_field(number: int, field_bits: int) -> int:
    """``number`` in each of the four fields of a word."""
    return number * sum(1 << field_bits * field for field in range(READ_AHEAD))


def choice_word(size: int, number: int) -> int:
    """Bits 2c and 2c + 1: where the set bit ``number`` (from 0) of c is, for every 4-bit c with ``size`` set bits."""
    word = 0
    for mask in range(1 << READ_AHEAD):
        bits = [bit for bit in range(READ_AHEAD) if mask >> bit & 1]
        if len(bits) == size:
            word |= bits[number] << 2 * mask
    return word


def source_term(source_gpu: int) -> int:
    """What a source adds to the sum that rules.replica_hash begins with."""
    return (source_gpu + 1) * 0xC2B2AE3D & 0xFFFFFFFF
