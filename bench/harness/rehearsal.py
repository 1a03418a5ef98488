"""A profile's rehearsal: the same arms and the same steps on the CPU, with a model and requests so small that it takes
minutes. It shows that a run on GPUs will go through; its speeds mean nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.harness.profile import Profile

RANKS = 2
MODEL = "random:layers=8,hidden=64,expert_width=32,heads=2,kv_heads=1,head_dim=32"
_FLAGS = (
    "--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native", "--disable-cuda-graph",
    "--disable-radix-cache", "--load-format", "dummy", "--context-length", "1024", "--max-total-tokens", "4096",
    "--max-running-requests", "16", "--decode-log-interval", "10", "--tp", str(RANKS), "--ep", str(RANKS),
)  # fmt: skip
_EPLB_FLAGS = (
    "--ep-num-redundant-experts", "8", "--ep-dispatch-algorithm", "dynamic", "--eplb-rebalance-num-iterations", "20",
    "--expert-distribution-recorder-buffer-size", "20",
)  # fmt: skip


def rehearsal(profile: Profile) -> Profile:
    """``profile`` on SGLang's CPU engine with 2 ranks. Its forced routing and its way of taking turns are kept."""
    flags = profile.server.flags
    forced = [flags[i : i + 2] for i, flag in enumerate(flags) if flag == "--ep-forced-routing"]
    server = replace(
        profile.server,
        engine="cpu",
        model=MODEL,
        ranks=RANKS,
        nodes=1,
        flags=(*_FLAGS, *(value for pair in forced for value in pair)),
        eplb_flags=_EPLB_FLAGS,
        environment={},
        ready_timeout_s=900,
        stagger_s=0.0,
    )
    load = replace(
        profile.load,
        requests={2: 8, 4: 12},
        prompts="random-ids",
        input_tokens=(8, 16),
        exact_input_tokens=0,
        output_tokens=16,
        output_spread=0,
        request_rate=0.0,
        warmup_requests=8,
        warmup_rounds=3,
        cell_timeout_s=300,
    )
    small: dict[str, Any] = {
        "requests": {4: 8},
        "input_tokens": (8, 16),
        "exact_input_tokens": 0,
        "cell_timeout_s": 300,
    }
    loads = {
        name: replace(
            other,
            **small,
            output_tokens=min(other.output_tokens, 24),
            output_spread=0,
            token_streams=min(other.token_streams, 2),
            request_rate=min(other.request_rate, 2.0),
        )
        for name, other in profile.loads.items()
    }
    title = f"Rehearsal on the CPU of: {profile.title}"
    profile = replace(profile, name=f"{profile.name}-rehearsal", title=title, blocks=1, link="")
    return replace(profile, server=server, load=load, loads=loads)
