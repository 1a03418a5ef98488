"""What the rule `cover` computes with in Triton: the GPUs of an expert's first four replicas in the fields of one word.

The four are compared at once (SIMD within a register): a field's top bit says whether a replica is near. The mask of
these bits and the hash decide which replica is taken; a 32-bit word made beforehand holds the answer for every mask.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from sglang_eplb_affinity.device.cover_words import choice_word, every_field, source_term

_ONE = tl.constexpr(choice_word(1, 0))
_TWO_0, _TWO_1 = (tl.constexpr(choice_word(2, number)) for number in range(2))
_THREE_0, _THREE_1, _THREE_2 = (tl.constexpr(choice_word(3, number)) for number in range(3))

_every_field = triton.constexpr_function(every_field)


_source_term = triton.constexpr_function(source_term)


@triton.jit
def replica_hash(row, expert, SOURCE: tl.constexpr):
    """dispatch.replica_hash in uint32 arithmetic. SOURCE: -1 for none."""
    h = row.to(tl.uint32) * 0x9E3779B1 + expert.to(tl.uint32) * 0x85EBCA77
    if SOURCE >= 0:
        h += _source_term(SOURCE)
    h = (h ^ (h >> 15)) * 0x2C1B3C6D
    return h ^ (h >> 13)


@triton.jit
def load_replicas(table, expert, WIDTH: tl.constexpr):
    """The first four slots of each expert; anything where it has fewer. WIDTH: of the table."""
    first = table + expert * WIDTH
    a = tl.load(first).to(tl.int32)
    b = a
    c = a
    d = a
    if WIDTH > 1:
        b = tl.load(first + 1).to(tl.int32)
    if WIDTH > 2:
        c = tl.load(first + 2).to(tl.int32)
    if WIDTH > 3:
        d = tl.load(first + 3).to(tl.int32)
    return a, b, c, d


@triton.jit
def pick(of, index):
    """of[index], element by element, of four vectors."""
    return tl.where(index < 2, tl.where(index == 0, of[0], of[1]), tl.where(index == 2, of[2], of[3]))


@triton.jit
def choices_of(hashed):
    """uint32: in bits 2c and 2c + 1 the index of the replica taken if c is the mask of the candidates."""
    third = hashed % 3
    of_two = tl.where(hashed & 1 == 0, _TWO_0, _TWO_1)
    of_three = tl.where(third == 0, _THREE_0, tl.where(third == 1, _THREE_1, _THREE_2))
    return of_two.to(tl.uint32) | of_three.to(tl.uint32) | (hashed << 30) | _ONE


@triton.jit
def _code(slot, SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, NODE_STEP: tl.constexpr):
    """The slot's GPU, numbered so that each node begins at a multiple of NODE_STEP."""
    gpu = slot.to(tl.uint32) // SLOTS_PER_GPU
    if GPUS_PER_NODE != NODE_STEP:
        gpu += gpu // GPUS_PER_NODE * (NODE_STEP - GPUS_PER_NODE)
    return gpu


@triton.jit
def packed(
    slots, FIELD: tl.constexpr, SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, NODE_STEP: tl.constexpr
):
    """The codes of four slots in fields of FIELD bits, whose top bits are 0. Of a slot of -1 it may be any code."""
    FULL: tl.constexpr = (1 << FIELD) - 1
    a = _code(slots[0], SLOTS_PER_GPU, GPUS_PER_NODE, NODE_STEP) & FULL
    b = _code(slots[1], SLOTS_PER_GPU, GPUS_PER_NODE, NODE_STEP) & FULL
    c = _code(slots[2], SLOTS_PER_GPU, GPUS_PER_NODE, NODE_STEP) & FULL
    d = _code(slots[3], SLOTS_PER_GPU, GPUS_PER_NODE, NODE_STEP) & FULL
    if FIELD == 8:
        return (a | (b << 8) | (c << 16) | (d << 24)) & 0x7F7F7F7F
    else:
        return ((a | (b << 16)).to(tl.uint64) | ((c | (d << 16)).to(tl.uint64) << 32)) & 0x7FFF7FFF7FFF7FFF


@triton.jit
def doubled_mask(candidates, FIELD: tl.constexpr):
    """Twice the 4-bit mask of the fields whose top bit is set."""
    if FIELD == 8:
        return (candidates * 0x00204081) >> 27  # the four bits meet at 28 to 31, and nothing else reaches 27
    else:
        bits = candidates >> 15
        folded = bits.to(tl.uint32) | ((bits >> 32).to(tl.uint32) << 2)
        return ((folded << 1) | (folded >> 14)) & 30


@triton.jit
def place_of(gpu, FIELD: tl.constexpr):
    """A GPU's code in every field, from a word whose lowest field it is."""
    return (gpu & ((1 << FIELD) - 1)) * _every_field(1, FIELD)


@triton.jit
def nowhere(like, FIELD: tl.constexpr):
    """The place of what goes nowhere, in the shape and type of ``like``."""
    return tl.full(like.shape, _every_field((1 << (FIELD - 1)) - 2, FIELD), like.dtype)


@triton.jit
def apart(gpus, places, FIELD: tl.constexpr, STEP: tl.constexpr):
    """In each field's top bit whether a replica is elsewhere than the place: on another GPU, or node of STEP codes."""
    LOW: tl.constexpr = _every_field((1 << (FIELD - 1)) - 1, FIELD)
    differences = gpus ^ places
    if STEP > 1:
        differences &= _every_field(((1 << (FIELD - 1)) - 1) // STEP * STEP, FIELD)
    return differences + LOW


@triton.jit
def near_of(valid, apart_bits, FIELD: tl.constexpr):
    """The valid candidates that are not apart."""
    return valid & (apart_bits ^ _every_field((1 << FIELD) - 1, FIELD))  # Triton's interpreter knows no ~ of uint32


@triton.jit
def near_first(near, otherwise):
    """The near candidates where there are any."""
    return tl.where(near != 0, near, otherwise)


@triton.jit
def has_several(candidates):
    """int32: whether more than one field's top bit is set; candidates are not 0."""
    return (candidates & (candidates - 1) != 0).to(tl.int32)


@triton.jit
def drawn(candidates, hashed, weights, FIELD: tl.constexpr):
    """uint32: the index of the candidate that the hash falls on if each has a share as large as its weight."""
    a = ((candidates >> (FIELD - 1)) & 1).to(tl.uint32) * weights[0]
    b = a + ((candidates >> (2 * FIELD - 1)) & 1).to(tl.uint32) * weights[1]
    c = b + ((candidates >> (3 * FIELD - 1)) & 1).to(tl.uint32) * weights[2]
    total = c + ((candidates >> (4 * FIELD - 1)) & 1).to(tl.uint32) * weights[3]
    at = tl.umulhi(hashed, total)
    return (at >= a).to(tl.uint32) + (at >= b).to(tl.uint32) + (at >= c).to(tl.uint32)


@triton.jit
def prepared(
    row, experts, counts, slots,
    SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, SOURCE: tl.constexpr, NODES: tl.constexpr,
    FIELD: tl.constexpr, NODE_STEP: tl.constexpr,
):  # fmt: skip
    """(gpus, valid, candidates, choices) of experts: their replicas' GPUs, the top bits of as many fields as there are
    replicas, those of them to choose from if the token goes nowhere near, and the choice for every mask."""
    codes = packed(slots, FIELD, SLOTS_PER_GPU, GPUS_PER_NODE, NODE_STEP)
    gpus = tl.where(experts >= 0, codes, nowhere(codes, FIELD))
    TOP: tl.constexpr = _every_field(1 << (FIELD - 1), FIELD)
    valid = TOP >> ((4 * FIELD - FIELD * counts) & (4 * FIELD - 1)).to(gpus.dtype)
    candidates = valid
    if SOURCE >= 0:
        CODE: tl.constexpr = _every_field(SOURCE + SOURCE // GPUS_PER_NODE * (NODE_STEP - GPUS_PER_NODE), FIELD)
        if NODES:
            candidates = near_first(near_of(valid, apart(gpus, CODE, FIELD, NODE_STEP), FIELD), candidates)
        candidates = near_first(near_of(valid, apart(gpus, CODE, FIELD, 1), FIELD), candidates)
    return gpus, valid, candidates, choices_of(replica_hash(row, tl.maximum(experts, 0), SOURCE))
