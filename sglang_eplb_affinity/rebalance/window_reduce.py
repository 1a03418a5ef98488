"""Sum the recorders of all ranks into one window, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from sglang_eplb_affinity.device.recorder import AffinityRecorder
from sglang_eplb_affinity.domain.routing import RoutingWindow


@dataclass(frozen=True)
class Reduction:
    """``group``: ranks to sum over (None: the default group). ``contributes``: this rank saw tokens no other counts."""

    contributes: bool
    group: dist.ProcessGroup | None = None


def reduce_window(recorder: AffinityRecorder, reduction: Reduction) -> RoutingWindow:
    """One window from all ranks' recorders, without co-activations; a collective call, with equal results everywhere.

    Counts are summed. The sample takes from each rank a share in proportion to the tokens it saw, so it stays uniform
    over all tokens; the shares are placed side by side and summed in one all-reduce.
    """
    counts = recorder.counts.clone() if reduction.contributes else torch.zeros_like(recorder.counts)
    world = dist.get_world_size(reduction.group) if dist.is_initialized() else 1
    rank = dist.get_rank(reduction.group) if dist.is_initialized() else 0
    state = torch.zeros(2, world, dtype=torch.int64, device=counts.device)
    rows = np.zeros(0, np.int64)
    if reduction.contributes:
        recorded, rows = recorder.own_tokens(recorder.counts, recorder.sample())
        state[0, rank], state[1, rank] = recorded, len(rows)
    if world > 1:
        dist.all_reduce(counts, group=reduction.group)
        dist.all_reduce(state, group=reduction.group)
    seen, held = state.cpu().numpy()
    shares = sample_shares(seen, held, recorder.config.sample_tokens)
    tokens, phase = _own_share(recorder, rows, shares, rank)
    if world > 1:
        # NCCL sums no int16. Ids are shifted by one so that 0 means "not mine"; the phases travel as one more column.
        ids = (tokens.to(torch.int32) + 1).flatten()
        packed = torch.cat([ids, phase.to(torch.int32) + 1])
        dist.all_reduce(packed, group=reduction.group)
        packed = (packed - 1).to(torch.int16)
        tokens, phase = packed[: ids.numel()].view(tokens.shape), packed[ids.numel() :].to(torch.int8)
    of_phase = counts.cpu().numpy()
    return RoutingWindow(
        of_phase.sum(0), None, tokens.cpu().numpy(), phase_counts=of_phase, token_phase=phase.cpu().numpy()
    )


def sample_shares(seen: np.ndarray, held: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [ranks]: rows each rank puts into a sample of ``capacity``, in proportion to the tokens it saw.

    ``held`` int64 [ranks]: rows that each has of them. What a rank lacks of its share others give of theirs: ranks
    that share their passes hold one sample together, so that chance says how much of it is on which.
    """
    shares = np.minimum(_in_proportion(seen, capacity), held)
    missing = min(capacity, int(held.sum()), int(seen.sum())) - int(shares.sum())
    return shares + _in_proportion(held - shares, missing)


def _in_proportion(weights: np.ndarray, total: int) -> np.ndarray:
    """int64 [ranks] that sum to ``total``, or ``weights`` where they sum to less."""
    if weights.sum() <= total:
        return weights.astype(np.int64)
    exact = weights * (total / int(weights.sum()))
    shares = np.floor(exact).astype(np.int64)
    # Largest remainders first, lower rank on ties, so that every rank computes the same.
    rest = np.argsort(-(exact - shares), kind="stable")[: total - int(shares.sum())]
    shares[rest] += 1
    return shares


def _own_share(
    recorder: AffinityRecorder, held: np.ndarray, shares: np.ndarray, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(int16 [layers, sample, k], int8 [sample]): this rank's tokens and their phases where they go, -1 elsewhere.

    ``held``: the rows of its sample that hold one.
    """
    sample = recorder.sample()
    tokens = torch.full_like(sample, -1)
    phase = torch.full((sample.shape[1],), -1, dtype=torch.int8, device=sample.device)
    if not shares[rank]:
        return tokens, phase
    start, count = int(shares[:rank].sum()), int(shares[rank])
    # The slots of a sample that is not full yet are in order of time, so a share of them must be drawn.
    rows = np.sort(np.random.default_rng(recorder.config.seed).permutation(held)[:count])
    tokens[:, start : start + len(rows)] = sample[:, torch.from_numpy(rows).to(sample.device)]
    phase[start : start + len(rows)] = torch.from_numpy(recorder.sample_phase()[rows]).to(sample.device)
    return tokens, phase
