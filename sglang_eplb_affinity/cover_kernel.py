"""The rule `cover` in Triton.

Which replica serves a column depends on what the columns before it got, so the columns of a token are K steps. In a
large pass each thread chooses for a token of its own (choose_in_registers): tensors are [tokens, columns] with at least
as many tokens as threads. Triton then keeps all columns of a token in one thread: a reduction over columns exchanges
nothing, and taking a column whose number is known when the kernel is compiled costs nothing. A small pass waits for the
one thread that does all of a token's work, so there each column has a thread (choose_in_lanes), which pays for an
exchange in every step and has little else to do.

A step compares the GPUs of an expert's first replicas with the places the token goes to already (the GPUs of its other
columns), which gives a mask with one bit per candidate. The mask and the hash decide which bit is taken; a 32-bit word
made before the steps holds the answer for every mask. The four GPUs are compared at once, in the fields of one word
(SIMD within a register).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from sglang_eplb_affinity.cover_words import choice_word

_ONE = tl.constexpr(choice_word(1, 0))
_TWO_0, _TWO_1 = (tl.constexpr(choice_word(2, number)) for number in range(2))
_THREE_0, _THREE_1, _THREE_2 = (tl.constexpr(choice_word(3, number)) for number in range(3))
_NOWHERE = tl.constexpr(0xFFFFFFFF)  # no GPU and no node


@triton.jit
def replica_hash(row, expert):
    """dispatch.replica_hash in uint32 arithmetic."""
    h = row.to(tl.uint32) * 0x9E3779B1 + expert.to(tl.uint32) * 0x85EBCA77
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
def _choices(hashed):
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
def _packed(
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
def _doubled_mask(candidates, FIELD: tl.constexpr):
    """Twice the 4-bit mask of the fields whose top bit is set."""
    if FIELD == 8:
        return (candidates * 0x00204081) >> 27  # the four bits meet at 28 to 31, and nothing else reaches 27
    else:
        bits = candidates >> 15
        folded = bits.to(tl.uint32) | ((bits >> 32).to(tl.uint32) << 2)
        return ((folded << 1) | (folded >> 14)) & 30


@triton.jit
def _and(a, b):
    return a & b


@triton.jit
def _column(of, is_j):
    """[tokens]: one column of [tokens, columns]."""
    return tl.sum(tl.where(is_j, of, 0), 1).to(of.dtype)


@triton.jit
def choose_in_registers(
    row, col, experts, counts, slots,
    K: tl.constexpr, SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, NUM_NODES: tl.constexpr,
    SOURCE: tl.constexpr, FIELD: tl.constexpr, NODE_STEP: tl.constexpr,
):  # fmt: skip
    """The slots [tokens, columns] of experts that have at most cover_words.READ_AHEAD replicas.

    row [tokens, 1]; col [1, columns]; experts and counts [tokens, columns]: -1 and 0 where a column is not used (which
    gets any slot); slots: four of the same shape. FIELD and NODE_STEP: :class:`cover_words.GpuCodes`.
    """
    WORD: tl.constexpr = tl.uint32 if FIELD == 8 else tl.uint64
    EACH: tl.constexpr = 0x01010101 if FIELD == 8 else 0x0001000100010001  # x * EACH: x in every field
    FULL: tl.constexpr = (1 << FIELD) - 1
    ALL: tl.constexpr = FULL * EACH
    LOW: tl.constexpr = (FULL >> 1) * EACH
    TOP: tl.constexpr = ((FULL >> 1) + 1) * EACH
    NOWHERE: tl.constexpr = ((FULL >> 1) - 1) * EACH
    NODE: tl.constexpr = ((FULL >> 1) // NODE_STEP * NODE_STEP) * EACH
    NODES: tl.constexpr = NUM_NODES > 1 and GPUS_PER_NODE > 1
    SOURCE_CODE: tl.constexpr = (SOURCE + SOURCE // GPUS_PER_NODE * (NODE_STEP - GPUS_PER_NODE)) * EACH
    used = experts >= 0
    gpus = tl.where(used, _packed(slots, FIELD, SLOTS_PER_GPU, GPUS_PER_NODE, NODE_STEP), NOWHERE).to(WORD)
    valid = TOP >> ((4 * FIELD - FIELD * counts) & (4 * FIELD - 1)).to(WORD)  # the top bit of each replica's field
    # Where the token goes: at first the GPUs of experts with one replica, in every field.
    places = tl.where(counts == 1, (gpus & FULL) * EACH, NOWHERE).to(WORD)
    anywhere = tl.max((counts == 1).to(tl.int32), 1)
    # The candidates if the token goes nowhere near them yet.
    otherwise = valid
    if SOURCE >= 0:
        if NODES:
            near = valid & ((((gpus ^ SOURCE_CODE) & NODE) + LOW) ^ ALL)
            otherwise = tl.where(near != 0, near, otherwise)
        near = valid & (((gpus ^ SOURCE_CODE) + LOW) ^ ALL)
        otherwise = tl.where(near != 0, near, otherwise)
    choices = _choices(replica_hash(row, tl.maximum(experts, 0)))
    indices = experts * 0
    for j in tl.static_range(K):
        is_j = col == j
        gpus_j = _column(gpus, is_j)
        valid_j = _column(valid, is_j)
        candidates = _column(otherwise, is_j)
        # A field keeps its top bit while no place is on that replica's GPU (or node).
        differences = gpus_j[:, None] ^ places
        if NODES:
            near = valid_j & (tl.reduce((differences & NODE) + LOW, 1, _and) ^ ALL)
            candidates = tl.where(near != 0, near, candidates)
        if NUM_NODES == 1:
            candidates = tl.where(anywhere > 0, valid_j, candidates)
        near = valid_j & (tl.reduce(differences + LOW, 1, _and) ^ ALL)
        candidates = tl.where(near != 0, near, candidates)
        index = (_column(choices, is_j) >> _doubled_mask(candidates, FIELD)) & 3
        indices = tl.where(is_j, index[:, None].to(tl.int32), indices)
        place = ((gpus_j >> (index * FIELD).to(WORD)) & FULL) * EACH
        places = tl.where(is_j, place[:, None], places)
        anywhere |= _column(used.to(tl.int32), is_j)
    return pick(slots, indices)


@triton.jit
def _from_column(of, first, j: tl.constexpr):
    """[items]: the token's column j in all its columns, one exchange between threads of a warp."""
    return tl.gather(of, first + j, 0)


@triton.jit
def choose_in_lanes(
    row, col, experts, counts, slots,
    K: tl.constexpr, SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, NUM_NODES: tl.constexpr,
    SOURCE: tl.constexpr, FIELD: tl.constexpr, NODE_STEP: tl.constexpr,
):  # fmt: skip
    """As choose_in_registers, with one thread for each column: all are [items], the columns of a token side by side.

    Every thread keeps which of its replicas are on a GPU (or node) that the token goes to, and each step tells all
    threads of a token where one more column goes, which is one exchange. The items must be those of one warp, or
    exchanges go through shared memory.
    """
    WORD: tl.constexpr = tl.uint32 if FIELD == 8 else tl.uint64
    EACH: tl.constexpr = 0x01010101 if FIELD == 8 else 0x0001000100010001
    FULL: tl.constexpr = (1 << FIELD) - 1
    ALL: tl.constexpr = FULL * EACH
    LOW: tl.constexpr = (FULL >> 1) * EACH
    TOP: tl.constexpr = ((FULL >> 1) + 1) * EACH
    NOWHERE: tl.constexpr = ((FULL >> 1) - 1) * EACH
    NODE: tl.constexpr = ((FULL >> 1) // NODE_STEP * NODE_STEP) * EACH
    NODES: tl.constexpr = NUM_NODES > 1 and GPUS_PER_NODE > 1
    SOURCE_CODE: tl.constexpr = (SOURCE + SOURCE // GPUS_PER_NODE * (NODE_STEP - GPUS_PER_NODE)) * EACH
    used = experts >= 0
    single = counts == 1
    gpus = tl.where(used, _packed(slots, FIELD, SLOTS_PER_GPU, GPUS_PER_NODE, NODE_STEP), NOWHERE).to(WORD)
    valid = TOP >> ((4 * FIELD - FIELD * counts) & (4 * FIELD - 1)).to(WORD)
    otherwise = valid
    if SOURCE >= 0:
        if NODES:
            near = valid & ((((gpus ^ SOURCE_CODE) & NODE) + LOW) ^ ALL)
            otherwise = tl.where(near != 0, near, otherwise)
        near = valid & (((gpus ^ SOURCE_CODE) + LOW) ^ ALL)
        otherwise = tl.where(near != 0, near, otherwise)
    choices = _choices(replica_hash(row, tl.maximum(experts, 0)))
    first = tl.arange(0, experts.numel) - col  # the token's first item
    # The place of each replica, in every field.
    a = (gpus & FULL) * EACH
    b = ((gpus >> FIELD) & FULL) * EACH
    c = ((gpus >> (2 * FIELD)) & FULL) * EACH
    d = ((gpus >> (3 * FIELD)) & FULL) * EACH
    # The top bits of replicas on a GPU (or a node) that the token goes to.
    near = tl.zeros(gpus.shape, WORD)
    near_node = near
    places = tl.where(single, a, NOWHERE).to(WORD)
    anywhere = experts < -1
    for j in tl.static_range(K):
        differences = gpus ^ _from_column(places, first, j)
        near |= valid & ((differences + LOW) ^ ALL)
        if NODES:
            near_node |= valid & (((differences & NODE) + LOW) ^ ALL)
        if NUM_NODES == 1 and SOURCE >= 0:  # the node of one column is every column's
            state = _from_column(single.to(tl.int32) * 2 + used.to(tl.int32), first, j)
            anywhere |= (state == 3) | ((state == 1) & (j < col))
    if NUM_NODES == 1 and SOURCE >= 0:
        otherwise = tl.where(anywhere, valid, otherwise)
    indices = experts * 0
    for j in tl.static_range(K):
        candidates = otherwise
        if NODES:
            candidates = tl.where(near_node != 0, near_node, candidates)
        candidates = tl.where(near != 0, near, candidates)
        index = choices >> _doubled_mask(candidates, FIELD)  # and what is above its two bits
        indices = tl.where(col == j, (index & 3).to(tl.int32), indices)
        if j < K - 1:
            odd = index & 1 != 0
            place = tl.where(index & 2 != 0, tl.where(odd, d, c), tl.where(odd, b, a))
            differences = gpus ^ _from_column(place, first, j)
            near |= valid & ((differences + LOW) ^ ALL)
            if NODES:
                near_node |= valid & (((differences & NODE) + LOW) ^ ALL)
    return pick(slots, indices)


@triton.jit
def _level(
    slot, at_gpu, at_node, SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, SOURCE: tl.constexpr
):  # fmt: skip
    """The first of the sets of candidates that each slot [tokens] belongs to, 0 to 4; 5 for no slot (-1)."""
    gpu = slot.to(tl.uint32) // SLOTS_PER_GPU
    node = gpu // GPUS_PER_NODE
    level = slot * 0 + 4
    if SOURCE >= 0:
        level = tl.where(node == SOURCE // GPUS_PER_NODE, 3, level)
        level = tl.where(gpu == SOURCE, 2, level)
    level = tl.where(tl.max((at_node == node[:, None]).to(tl.int32), 1) > 0, 1, level)
    level = tl.where(tl.max((at_gpu == gpu[:, None]).to(tl.int32), 1) > 0, 0, level)
    return tl.where(slot >= 0, level, 5)


@triton.jit
def choose_in_loops(
    row, col, experts, counts, first_slots, table,
    K: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """As choose_in_registers, for any number of replicas. first_slots [tokens, columns]: the first replica of each."""
    first_gpu = first_slots.to(tl.uint32) // SLOTS_PER_GPU
    at_gpu = tl.where(counts == 1, first_gpu, _NOWHERE).to(tl.uint32)
    at_node = tl.where(counts == 1, first_gpu // GPUS_PER_NODE, _NOWHERE).to(tl.uint32)
    all_chosen = first_slots
    j = 0
    while j < K:
        is_j = col == j
        expert = tl.maximum(_column(experts, is_j), 0)
        count = _column(counts, is_j)
        first = table + expert * WIDTH
        most = tl.max(count, 0)
        best = count * 0 + 4
        size = count * 0
        r = 0
        while r < most:
            slot = tl.load(first + r, mask=r < count, other=-1).to(tl.int32)
            level = _level(slot, at_gpu, at_node, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE)
            size = tl.where(level < best, 0, size) + (level <= best).to(tl.int32)
            best = tl.minimum(level, best)
            r += 1
        hashed = _column(replica_hash(row, tl.maximum(experts, 0)), is_j)
        wanted = (hashed % tl.maximum(size, 1).to(tl.uint32)).to(tl.int32)
        chosen = count * 0 - 1
        passed = count * 0
        r = 0
        while r < most:
            slot = tl.load(first + r, mask=r < count, other=-1).to(tl.int32)
            level = _level(slot, at_gpu, at_node, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE)
            chosen = tl.where((level == best) & (passed == wanted), slot, chosen)
            passed += (level == best).to(tl.int32)
            r += 1
        gpu = tl.where(count > 0, chosen.to(tl.uint32) // SLOTS_PER_GPU, _NOWHERE).to(tl.uint32)
        node = tl.where(count > 0, gpu // GPUS_PER_NODE, _NOWHERE).to(tl.uint32)
        all_chosen = tl.where(is_j, chosen[:, None], all_chosen)
        at_gpu = tl.where(is_j, gpu[:, None], at_gpu)
        at_node = tl.where(is_j, node[:, None], at_node)
        j += 1
    return all_chosen
