"""The Triton kernel that maps logical to physical experts and records, in one launch per layer.

Its references are :func:`dispatch.choose_replicas` and :meth:`recorder.AffinityRecorder.record`, which it equals bit
for bit. Counts are added by integer atomics, so the order of programs does not matter. One fused kernel for both is
vLLM's idea (its pull request 24573); here it also applies every dispatch rule, the padding mask and the token sample.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_RULE = 0  # ids stay logical: record only
TABLE = 1  # `static`: one slot per expert on this rank
DYNAMIC = 2
COVER = 3


@triton.jit
def _replica_hash(row, expert):  # type: ignore[no-untyped-def]
    """dispatch.replica_hash in uint32 arithmetic."""
    h = row.to(tl.uint32) * 0x9E3779B1 + expert.to(tl.uint32) * 0x85EBCA77
    h = (h ^ (h >> 15)) * 0x2C1B3C6D
    return h ^ (h >> 13)


@triton.jit
def _nearness(  # type: ignore[no-untyped-def]
    slot, ok, gpu_at, node_at, SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, SOURCE: tl.constexpr
):
    """The first of `cover`'s candidate sets that each token's replica in ``slot`` belongs to; 5 where not ``ok``."""
    gpu = slot // SLOTS_PER_GPU
    node = gpu // GPUS_PER_NODE
    level = tl.where(ok, 4, 5)
    if SOURCE >= 0:
        level = tl.where(ok & (node == SOURCE // GPUS_PER_NODE), 3, level)
        level = tl.where(ok & (gpu == SOURCE), 2, level)
    on_node = tl.max((node_at == node[:, None]).to(tl.int32), 1) > 0
    level = tl.where(ok & on_node, 1, level)
    on_gpu = tl.max((gpu_at == gpu[:, None]).to(tl.int32), 1) > 0
    return tl.where(ok & on_gpu, 0, level)


@triton.jit
def map_and_record(  # type: ignore[no-untyped-def]
    ids, num_valid_rows, state, counts, sample, table, table_counts, num_rows, row_stride, rows_per_group,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, RULE: tl.constexpr, RECORD: tl.constexpr,
    HAS_VALID: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr, SLOT_OFFSET: tl.constexpr,
    MAX_TOKENS: tl.constexpr, SAMPLE: tl.constexpr, PHASE_STRIDE: tl.constexpr, TABLE_STRIDE: tl.constexpr,
    SLOTS_PER_GPU: tl.constexpr, GPUS_PER_NODE: tl.constexpr, SOURCE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One item is one (row, column). `cover` works on tiles of BLOCK rows and KP >= K columns, since the replica of one
    column depends on the others; the other rules on flat blocks of BLOCK items, which need no exchange between threads.
    All pointers but ``ids``, ``num_valid_rows`` and ``state`` are the layer's. BINS > 0, a power of 2 that is no less
    than the number of experts: counts are added up in the block first, because many tokens queue for a hot expert's.
    """
    if RULE == 3:
        row_of_tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row, col = tl.broadcast(row_of_tile[:, None], tl.arange(0, KP)[None, :])
    else:
        item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = item // K
        col = item % K
    ITEMS: tl.constexpr = BLOCK * KP if RULE == 3 else BLOCK
    inside = (row < num_rows) & (col < K)
    at = row.to(tl.int64) * row_stride + col
    expert = tl.load(ids + at, mask=inside, other=-1).to(tl.int32)
    used = expert >= 0
    safe = tl.maximum(expert, 0)
    real = inside
    if HAS_VALID:
        real = inside & (row < tl.load(num_valid_rows).to(tl.int32))

    if RECORD:
        if GROUPS == 1:
            token = row
            counted = real & (row < tl.load(state + 1))
        else:
            if EVEN:
                group = row // rows_per_group
                position = row % rows_per_group
            else:
                group = row * 0
                for g in tl.static_range(1, GROUPS):
                    group += (row >= tl.load(state + 1 + 2 * GROUPS + g)).to(tl.int32)
                position = row - tl.load(state + 1 + 2 * GROUPS + group, mask=inside, other=0)
            counted = real & (position < tl.load(state + 1 + group, mask=inside, other=0))
            token = position + tl.load(state + 1 + GROUPS + group, mask=inside, other=0)
        to_counts = counts + tl.load(state).to(tl.int64) * PHASE_STRIDE
        if BINS > 0:
            flat = tl.reshape(safe, [ITEMS])
            added = tl.histogram(flat, BINS, mask=tl.reshape(counted & used, [ITEMS]))
            bins = tl.arange(0, BINS)
            tl.atomic_add(to_counts + bins, added.to(tl.int64), mask=added > 0, sem="relaxed")
        else:
            tl.atomic_add(to_counts + safe, (safe * 0 + 1).to(tl.int64), mask=counted & used, sem="relaxed")
        slot = tl.load(state + SLOT_OFFSET + token, mask=counted & (token < MAX_TOKENS), other=SAMPLE)
        tl.store(sample + slot.to(tl.int64) * K + col, expert.to(tl.int16), mask=slot < SAMPLE)

    if RULE != 0:
        if RULE == 1:
            physical = tl.load(table + safe, mask=used, other=-1).to(tl.int32)
        else:
            replicas = tl.load(table_counts + safe, mask=used, other=1).to(tl.int32)
            if RULE == 2:
                choice = (_replica_hash(row, safe) % replicas.to(tl.uint32)).to(tl.int32)
                physical = tl.load(table + safe * TABLE_STRIDE + choice, mask=used, other=-1).to(tl.int32)
            else:
                physical = tl.load(table + safe * TABLE_STRIDE, mask=used, other=-1).to(tl.int32)
                several = used & (replicas > 1)
                # Where a token goes already; -1 matches no GPU and no node.
                gpu_at = tl.where(used & (replicas == 1), physical // SLOTS_PER_GPU, -1)
                node_at = tl.where(used & (replicas == 1), physical // (SLOTS_PER_GPU * GPUS_PER_NODE), -1)
                # The first replicas of all columns at once: one wait for memory instead of one per column.
                second = tl.load(table + safe * TABLE_STRIDE + 1, mask=several, other=0).to(tl.int32)
                third = tl.load(table + safe * TABLE_STRIDE + 2, mask=several & (replicas > 2), other=0).to(tl.int32)
                fourth = tl.load(table + safe * TABLE_STRIDE + 3, mask=several & (replicas > 3), other=0).to(tl.int32)
                most = tl.max(tl.max(tl.where(several, replicas, 0), 1), 0)
                if most > 0:
                    for j in range(0, K):
                        is_j = col == j
                        count = tl.sum(tl.where(is_j & several, replicas, 0), 1)
                        of_j = tl.sum(tl.where(is_j, safe, 0), 1)
                        first = table + of_j * TABLE_STRIDE
                        at_0 = tl.sum(tl.where(is_j, physical, 0), 1)
                        at_1 = tl.sum(tl.where(is_j, second, 0), 1)
                        at_2 = tl.sum(tl.where(is_j, third, 0), 1)
                        at_3 = tl.sum(tl.where(is_j, fourth, 0), 1)
                        near_0 = _nearness(at_0, count > 0, gpu_at, node_at, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE)
                        near_1 = _nearness(at_1, count > 1, gpu_at, node_at, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE)
                        near_2 = _nearness(at_2, count > 2, gpu_at, node_at, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE)
                        near_3 = _nearness(at_3, count > 3, gpu_at, node_at, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE)
                        best = tl.minimum(tl.minimum(near_0, near_1), tl.minimum(near_2, near_3))
                        is_0 = (near_0 == best).to(tl.int32)
                        is_1 = (near_1 == best).to(tl.int32)
                        is_2 = (near_2 == best).to(tl.int32)
                        size = is_0 + is_1 + is_2 + (near_3 == best).to(tl.int32)
                        in_front = best  # of the replicas from the fifth on none is nearer yet
                        r = 4
                        while r < most:
                            ok = r < count
                            at_r = tl.load(first + r, mask=ok, other=0).to(tl.int32)
                            level = _nearness(at_r, ok, gpu_at, node_at, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE)
                            size = tl.where(level < best, 0, size) + (level <= best).to(tl.int32)
                            best = tl.minimum(level, best)
                            r += 1
                        hashed = _replica_hash(row_of_tile, of_j)
                        wanted = (hashed % tl.maximum(size, 1).to(tl.uint32)).to(tl.int32)
                        still = (in_front == best).to(tl.int32)  # the first four hold candidates
                        is_0 = is_0 * still
                        is_1 = is_1 * still
                        is_2 = is_2 * still
                        is_3 = (near_3 == best).to(tl.int32) * still
                        chosen = tl.where((is_3 > 0) & (wanted == is_0 + is_1 + is_2), at_3, at_0)
                        chosen = tl.where((is_2 > 0) & (wanted == is_0 + is_1), at_2, chosen)
                        chosen = tl.where((is_1 > 0) & (wanted == is_0), at_1, chosen)
                        chosen = tl.where((is_0 > 0) & (wanted == 0), at_0, chosen)
                        passed = is_0 + is_1 + is_2 + is_3
                        r = 4
                        while r < most:
                            ok = r < count
                            at_r = tl.load(first + r, mask=ok, other=0).to(tl.int32)
                            level = _nearness(at_r, ok, gpu_at, node_at, SLOTS_PER_GPU, GPUS_PER_NODE, SOURCE)
                            chosen = tl.where(ok & (level == best) & (passed == wanted), at_r, chosen)
                            passed += (level == best).to(tl.int32)
                            r += 1
                        here = is_j & (count > 0)[:, None]
                        physical = tl.where(here, chosen[:, None], physical)
                        gpu_at = tl.where(here, chosen[:, None] // SLOTS_PER_GPU, gpu_at)
                        node_at = tl.where(here, chosen[:, None] // (SLOTS_PER_GPU * GPUS_PER_NODE), node_at)
        tl.store(ids + at, tl.where(used & real, physical, -1).to(ids.dtype.element_ty), mask=inside)
