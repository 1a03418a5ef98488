"""How large a pass may be that ``primary`` serves with one active slot an expert (primaries.py)."""

from __future__ import annotations

# Simulated on 2 to 72 GPUs of one node (docs/design.md): rows of a primary slot up to which one of each expert is no
# slower than all, for each redundant slot of a GPU; and where that ends, since hot experts' products take more tiles.
ROWS_PER_REDUNDANT_SLOT = 8
MOST_ROWS = 96


def most_tokens(num_experts: int, redundant: int, top_k: int, num_gpus: int, own_tokens: bool) -> int:
    """Rows of a rank up to which a pass is small, with as many on every rank: what ``redundant`` experts in all would
    cost by their weights grows with their number, what they save by even load with the rows.

    ``own_tokens``: each rank routes tokens of its own (an all-to-all backend), else every rank all tokens.
    """
    rows_times_gpus = min(ROWS_PER_REDUNDANT_SLOT * redundant, MOST_ROWS * num_gpus)
    return rows_times_gpus * num_experts // (num_gpus * top_k * (num_gpus if own_tokens else 1))
