"""The figures that the affinity change was proposed with; theirs, on their hardware and model, one run.

antgroup/sglang pull request 2 (2025-09): 5 requests/s, 4096 prompts of 4096 tokens, 1536 tokens out, ShareGPT.
"""

from __future__ import annotations

SOURCE = "antgroup/sglang pull request 2"
ARMS = ("none", "vanilla", "affinity")

# Concurrency -> metric -> no EPLB, vanilla, affinity; what they did not publish is left out.
FIGURES: dict[int, dict[str, tuple[float, float, float]]] = {
    64: {
        "p50_ttft_ms": (566.78, 540.49, 559.74),
        "p90_tpot_ms": (45.02, 44.95, 44.94),
        "qps": (1.35, 1.36, 1.36),
    },
    128: {
        "p50_ttft_ms": (539.93, 537.22, 541.04),
        "p90_tpot_ms": (49.18, 49.10, 49.10),
        "qps": (2.36, 2.36, 2.36),
    },
    256: {
        "p50_ttft_ms": (764.42, 754.62, 758.67),
        "p90_tpot_ms": (56.32, 56.18, 56.06),
        "qps": (3.37, 3.37, 3.37),
    },
    1536: {
        "p50_ttft_ms": (1464.77, 1463.27, 1485.56),
        "p90_tpot_ms": (85.12, 84.31, 81.38),
        "p95_itl_ms": (102.60, 100.71, 97.22),
        "qps": (4.48, 4.48, 4.49),
    },
    2048: {
        "p50_ttft_ms": (1470.45, 1463.95, 1480.91),
        "p90_tpot_ms": (85.15, 84.60, 81.39),
        "p95_itl_ms": (102.87, 100.21, 97.08),
        "qps": (4.48, 4.48, 4.49),
    },
}
