"""The Triton kernel that maps logical to physical experts and records, in one launch per layer.

Its references are :func:`dispatch.choose_replicas` and :meth:`recorder.AffinityRecorder.record`, which it equals bit
for bit. Counts are added by integer atomics, so the order of programs does not matter. One fused kernel for both is
vLLM's idea (its pull request 24573); here it also applies every dispatch rule, the padding mask and the token sample.

A small pass takes little longer than an empty launch, and what it takes is waiting for memory. Hence: everything whose
address is known is loaded before anything is stored, and an address is kept in range where a load could be masked,
since a masked load becomes a branch over which later loads are not moved.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from sglang_eplb_affinity.device.cover_words import READ_AHEAD
from sglang_eplb_affinity.device.triton.balance_kernel import (
    BOTH,
    CHOOSE,
    COUNT,
    add_to_pass,
    empty_when_last,
    load_counts,
    pass_counts,
    weight_of_slot,
    weights_of,
)
from sglang_eplb_affinity.device.triton.cover_fields_kernel import load_replicas, pick, replica_hash
from sglang_eplb_affinity.device.triton.cover_kernel import choose_in_loops, choose_in_registers
from sglang_eplb_affinity.device.triton.cover_lanes_kernel import choose_in_lanes
from sglang_eplb_affinity.dispatch.rules import RuleNumber

NO_RULE = 0  # ids stay logical: record only

_STATIC = tl.constexpr(int(RuleNumber.STATIC))  # here: one slot per expert on this rank
_DYNAMIC = tl.constexpr(int(RuleNumber.DYNAMIC))
_COVER = tl.constexpr(int(RuleNumber.COVER))
_COUNT, _CHOOSE, _BOTH = tl.constexpr(COUNT), tl.constexpr(CHOOSE), tl.constexpr(BOTH)
_FEW = tl.constexpr(READ_AHEAD)


@triton.jit
def _token_of(state, row, row_number, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """(token of the pass, whether it is a real one) of each row; see recorder.RowLayout, and row_number there."""
    if GROUPS == 1:
        token = row + row_number
        is_token = token < tl.load(state + 1)
    else:
        if EVEN:
            group = row // row_number
            position = row % row_number
        else:
            group = row * 0
            for g in tl.static_range(1, GROUPS):
                group += (row >= tl.load(state + 1 + 2 * GROUPS + g)).to(tl.int32)
            position = row - tl.load(state + 1 + 2 * GROUPS + group)
        is_token = position < tl.load(state + 1 + group)
        token = position + tl.load(state + 1 + GROUPS + group)
    return token, is_token


@triton.jit
def _add_counts(to_counts, expert, BINS: tl.constexpr):
    """Count the experts of a block, -1 for none; BINS > 0: added up in the block first."""
    if BINS > 0:
        expert = tl.reshape(expert, [expert.numel], can_reorder=True)
    counted = expert >= 0
    safe = tl.maximum(expert, 0)
    if BINS > 0:
        added = tl.histogram(safe, BINS, mask=counted)
        tl.atomic_add(to_counts + tl.arange(0, BINS), added.to(tl.int64), mask=added > 0, sem="relaxed")
    else:
        tl.atomic_add(to_counts + safe, (safe * 0 + 1).to(tl.int64), mask=counted, sem="relaxed")


@triton.jit
def _cover(
    row, col, expert, replicas, slots, most, table, gpu_weights,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, TABLE_STRIDE: tl.constexpr, SLOTS_PER_GPU: tl.constexpr,
    GPUS_PER_NODE: tl.constexpr, NUM_NODES: tl.constexpr, SOURCE: tl.constexpr, FIELD: tl.constexpr,
    NODE_STEP: tl.constexpr, LANES: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """(slots, whether there were other candidates as near) by `cover`; most: the most replicas of an expert here."""
    physical = slots[0]
    tied = expert * 0
    weights = slots
    if WEIGHTED:
        weights = (
            weight_of_slot(gpu_weights, slots[0], SLOTS_PER_GPU), weight_of_slot(gpu_weights, slots[1], SLOTS_PER_GPU),
            weight_of_slot(gpu_weights, slots[2], SLOTS_PER_GPU), weight_of_slot(gpu_weights, slots[3], SLOTS_PER_GPU),
        )  # fmt: skip
    if LANES:
        physical, tied = choose_in_lanes(
            row, col, expert, replicas, slots, weights,
            K, SLOTS_PER_GPU, GPUS_PER_NODE, NUM_NODES, SOURCE, FIELD, NODE_STEP, WEIGHTED,
        )  # fmt: skip
        if most > _FEW:
            rows: tl.constexpr = [BLOCK // KP, KP]
            chosen, tied_rows = choose_in_loops(
                tl.program_id(0) * (BLOCK // KP) + tl.arange(0, BLOCK // KP)[:, None], tl.arange(0, KP)[None, :],
                tl.reshape(expert, rows), tl.reshape(replicas, rows), tl.reshape(slots[0], rows), table, gpu_weights,
                K, TABLE_STRIDE, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE, WEIGHTED,
            )  # fmt: skip
            physical = tl.reshape(chosen, [BLOCK])
            tied = tl.reshape(tied_rows, [BLOCK])
    elif most > _FEW:
        physical, tied = choose_in_loops(
            row, col, expert, replicas, slots[0], table, gpu_weights, K, TABLE_STRIDE, SLOTS_PER_GPU, GPUS_PER_NODE,
            SOURCE, WEIGHTED,
        )  # fmt: skip
    elif most > 1:  # else there is nothing to choose
        physical, tied = choose_in_registers(
            row, col, expert, replicas, slots, weights,
            K, SLOTS_PER_GPU, GPUS_PER_NODE, NUM_NODES, SOURCE, FIELD, NODE_STEP, WEIGHTED,
        )  # fmt: skip
    return physical, tied


# One compiled kernel serves passes of any size and every layer: it must not be made for the numbers of the first call.
@triton.jit(
    do_not_specialize=["num_rows", "row_stride", "row_number"],
    do_not_specialize_on_alignment=[
        "ids", "num_valid_rows", "state", "counts", "sample", "table", "table_counts", "balance"
    ],
)  # fmt: skip
def map_and_record(
    ids, num_valid_rows, state, counts, sample, table, table_counts, balance, num_rows, row_stride, row_number,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, RULE: tl.constexpr, RECORD: tl.constexpr,
    HAS_VALID: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr, SLOT_OFFSET: tl.constexpr,
    MAX_TOKENS: tl.constexpr, SAMPLE: tl.constexpr, PHASE_STRIDE: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, NUM_NODES: tl.constexpr, SOURCE: tl.constexpr,
    FIELD: tl.constexpr, NODE_STEP: tl.constexpr, BINS: tl.constexpr, LANES: tl.constexpr,
    STAGE: tl.constexpr, GPU_BINS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """BLOCK (row, column) items of a pass, or for the rules of `cover`, whose columns depend on each other, BLOCK
    whole rows, or with LANES the BLOCK // KP rows of one warp.

    All pointers but ``ids``, ``num_valid_rows`` and ``state`` are the layer's. KP: the power of 2 from K on. BINS > 0,
    a power of 2 no less than the number of experts: counts are added up in the block first, as many tokens queue for
    a hot expert's. STAGE: what is done of `cover_balanced` (balance_kernel.py), whose workspace ``balance`` is, int32
    [TICKET_INTS + 2 * GPU_BINS]; GPU_BINS: the power of 2 from the number of GPUs on. Ids from
    EXPERTS on are no expert's: neither mapped nor recorded. The rules of `cover`
    need at least as many rows as the program has threads, or LANES and a thread for each item.
    """
    ROWS: tl.constexpr = RULE >= _COVER and not LANES
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if ROWS:  # [rows, columns]
        row = at[:, None]
        col = tl.arange(0, KP)[None, :]
    elif LANES:
        row = at // KP
        col = at % KP
    else:
        row = at // K
        col = at % K
    if RULE >= _COVER:
        inside = (row < num_rows) & (col < K)
        own_col = tl.minimum(col, K - 1)
    else:
        inside = row < num_rows
        own_col = col
    own_row = tl.minimum(row, num_rows - 1)
    ids_at = ids + own_row.to(tl.int64) * row_stride + own_col
    if ROWS:  # knowing that columns are neighbours in memory, Triton would deal them out to threads
        ids_at = tl.max_contiguous(ids_at, [1, 1])
    # A row beyond the last may be read after its ids were overwritten: what is read there must not be used.
    given = tl.where(inside, tl.load(ids_at).to(tl.int32), -1)
    expert = tl.where(given < EXPERTS, given, -1)
    used = expert >= 0
    safe = tl.maximum(expert, 0)
    real = row < num_rows
    if HAS_VALID:
        real = real & (row < tl.load(num_valid_rows).to(tl.int32))
    if RECORD:
        to_counts = counts + tl.load(state).to(tl.int64) * PHASE_STRIDE
        token, is_token = _token_of(state, own_row, row_number, GROUPS, EVEN)
        # The state's last entry, for tokens from MAX_TOKENS on, says "not sampled".
        slot = tl.load(state + SLOT_OFFSET + tl.minimum(token, MAX_TOKENS))
        counted = real & is_token
        sampled = counted & (slot < SAMPLE)
        sample_at = sample + slot.to(tl.int64) * K + own_col
        if ROWS:
            sample_at = tl.max_contiguous(sample_at, [1, 1])
    if RULE == _STATIC:
        physical = tl.load(table + safe).to(tl.int32)
    if RULE > _STATIC:
        slots = load_replicas(table, safe, TABLE_STRIDE)
        replicas = tl.where(used, tl.load(table_counts + safe).to(tl.int32), 0)

    if RECORD:
        _add_counts(to_counts, tl.where(counted & used, expert, -1), BINS)
        tl.store(sample_at, expert.to(tl.int16), mask=sampled & inside)
    if RULE > _STATIC:
        most = tl.max(tl.reshape(replicas, [replicas.numel], can_reorder=True), 0)
    if RULE == _DYNAMIC:
        hashed = replica_hash(row, safe, SOURCE)
        number = tl.where(replicas == 2, hashed & 1, tl.where(replicas == 3, hashed % 3, hashed & 3))
        physical = pick(slots, tl.where(replicas == 1, 0, number))
        if most > _FEW:
            choice = (hashed % tl.maximum(replicas, 1).to(tl.uint32)).to(tl.int32)
            physical = tl.load(table + safe * TABLE_STRIDE + choice).to(tl.int32)
    if RULE >= _COVER:
        counted_here = used & real
        if STAGE != _CHOOSE:
            physical, tied = _cover(
                row, col, expert, replicas, slots, most, table, replicas, K, KP, BLOCK, TABLE_STRIDE, SLOTS_PER_GPU,
                GPUS_PER_NODE, NUM_NODES, SOURCE, FIELD, NODE_STEP, LANES, False,
            )  # fmt: skip
        if STAGE == _COUNT:
            add_to_pass(balance, physical, tied, counted_here, SLOTS_PER_GPU, GPU_BINS, BINS > 0)
        if STAGE == _BOTH:
            pass_load = pass_counts(physical, tied, counted_here, SLOTS_PER_GPU, GPU_BINS)
        if STAGE == _CHOOSE:
            pass_load = load_counts(balance, GPU_BINS)
        if STAGE >= _CHOOSE:
            weights = weights_of(pass_load, GPUS_PER_NODE * NUM_NODES, GPU_BINS)
            physical, tied = _cover(
                row, col, expert, replicas, slots, most, table, weights, K, KP, BLOCK, TABLE_STRIDE, SLOTS_PER_GPU,
                GPUS_PER_NODE, NUM_NODES, SOURCE, FIELD, NODE_STEP, LANES, True,
            )  # fmt: skip
    if RULE != 0 and STAGE != _COUNT:
        tl.store(ids_at, tl.where(real, tl.where(used, physical, given), -1).to(ids.dtype.element_ty), mask=inside)
    if STAGE == _CHOOSE:
        empty_when_last(balance, GPU_BINS)
