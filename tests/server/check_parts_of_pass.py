"""Eight ranks of one attention group behind an all-to-all: what the recorders keep of passes as SGLang cuts them.

Runs in a Python with patched SGLang, with its own batches, counts of rows and parallel sizes; see test_objects.py.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

RANKS, PASSES, SAMPLE = 8, 1000, 1024
BUCKETS = (8, 16, 32, 64)  # token counts of captured graphs; larger passes run eagerly


def parallel_of(rank: int) -> dict[str, int]:
    sizes = {
        "tp_size": RANKS,
        "attn_tp_size": RANKS,
        "moe_ep_size": RANKS,
        "attn_cp_size": 1,
        "attn_dp_size": 1,
        "num_dp_ranks": 1,
    }
    ranks = {"tp_rank": rank, "attn_tp_rank": rank, "moe_ep_rank": rank, "attn_cp_rank": 0, "attn_dp_rank": 0}
    return {**sizes, **ranks, "moe_tp_rank": 0, "attn_dp_enabled": False}


def recorder_of(rank: int) -> Any:
    from sglang_eplb_affinity.domain.topology import Topology
    from sglang_eplb_affinity.planner.config import PlannerConfig
    from sglang_eplb_affinity.sglang_hooks import recording
    from sglang_eplb_affinity.sglang_hooks.model_shape import MoeShape
    from sglang_eplb_affinity.sglang_hooks.settings import Settings

    settings = Settings("affinity", "dynamic", Topology(RANKS, 1), PlannerConfig())
    settings = dataclasses.replace(
        settings,
        own_tokens=True,
        shape=MoeShape(2, PASSES, 1, (0, 1)),
        recording=dataclasses.replace(settings.recording, sample_tokens=SAMPLE),
    )
    metadata = SimpleNamespace(num_layers=2, num_logical_experts=PASSES)
    with mock.patch.object(recording, "this_rank", lambda: rank):
        return recording.ServerRecorder(settings, metadata, SimpleNamespace(records_affinity_now=lambda: True))


def run_pass(recorder: Any, tokens: int, expert: int, rank: int) -> int:
    """One pass of a rank whose tokens all choose ``expert``; returns how many of them this rank has."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=tokens,
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        req_pool_indices=None,
        seq_lens=None,
        out_cache_loc=None,
        seq_lens_sum=0,
    )
    batch._init_num_token_non_padded(device="cpu", is_draft_worker=False)
    recorder.on_forward_pass_start(batch)
    # The runner pads afterwards: to a multiple of the attention group, or to the captured graph's bucket.
    padded = min((size for size in BUCKETS if size >= tokens), default=-(-tokens // RANKS) * RANKS)
    batch.global_num_tokens_cpu = [padded]
    batch.set_local_num_token_non_padded(sharded=True)
    rows = torch.zeros(padded, 1, dtype=torch.int64).tensor_split(RANKS)[rank]
    ids = torch.full_like(rows, expert)
    for layer in range(2):
        layout = recorder.rows_to_record(layer, len(rows))
        recorder.recorder.record(layer, ids, layout, batch.num_token_non_padded)
    recorder.on_forward_pass_end()
    return int(batch.num_token_non_padded)


def findings() -> dict[str, Any]:
    from sglang.srt.runtime_context import get_parallel

    from sglang_eplb_affinity.device.recorder import PHASES
    from sglang_eplb_affinity.rebalance.window_exchange import WindowShape
    from sglang_eplb_affinity.rebalance.window_reduce import sample_shares
    from sglang_eplb_affinity.sglang_hooks.window_snapshot import RecorderWindow

    lengths = np.random.default_rng(0).integers(1, 200, PASSES)
    lengths[: PASSES // 2] = lengths[: PASSES // 2] % 24 + 1
    shape = WindowShape(2, PASSES, 1, SAMPLE)
    seen, parts, counts, held = [], [], np.zeros((len(PHASES), 2, PASSES), np.int64), []
    for rank in range(RANKS):
        with get_parallel().override(**parallel_of(rank)):
            recorder = recorder_of(rank)
            own = sum(run_pass(recorder, int(length), number, rank) for number, length in enumerate(lengths))
        of_host, rows = recorder.recorder.own_tokens(recorder.recorder.counts, recorder.recorder.sample())
        window = RecorderWindow(recorder.own_recorder, recorder.reset, shape, torch.device("cpu"), seed=rank)
        told, of_rank, tokens = window.take().wait()
        assert (told, of_host, tokens.shape[1]) == (own, own, len(rows))
        seen.append(own)
        held.append(tokens.shape[1])
        parts.append(tokens)
        counts += of_rank
    shares = sample_shares(np.array(seen), np.array(held), SAMPLE)
    sample = torch.cat([part[:, :share] for part, share in zip(parts, shares, strict=True)], 1)[:, :, 0].numpy()
    first = np.bincount(sample[0], minlength=PASSES)[: PASSES // 100].sum()
    half = (sample[0] < PASSES // 2).mean()
    return {
        "rows": int((sample >= 0).all(0).sum()),
        "layers agree": bool((sample[0] == sample[1]).all()),
        "counted every token": bool((counts.sum(0) == lengths).all()),
        "first percent": [int(first), float(lengths[: PASSES // 100].sum() / lengths.sum() * SAMPLE)],
        "first half": [float(half), float(lengths[: PASSES // 2].sum() / lengths.sum())],
        "rows of ranks": [int(number) for number in held],
    }
