"""Windows with hot experts and topics, and drawn planning problems."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sglang_eplb_affinity.domain.routing import RoutingWindow, coactivation_of
from sglang_eplb_affinity.domain.topology import Topology

RELAXED = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def skewed_tokens(rng: np.random.Generator, layers: int, tokens: int, experts: int, k: int) -> np.ndarray:
    """int16 [layers, tokens, k] top-k sets with hot experts and groups of experts that fire together."""
    base = rng.gumbel(size=(layers, tokens, experts)) + rng.normal(size=(layers, 1, experts))
    topic = rng.integers(0, 4, size=(layers, tokens, 1))
    group = rng.integers(0, 4, size=(layers, 1, experts))
    scores = base + 2.0 * (topic == group)
    return np.argsort(-scores, axis=-1)[..., :k].astype(np.int16)


def window_of(tokens: np.ndarray, experts: int) -> RoutingWindow:
    counts = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in tokens]).astype(np.int64)
    return RoutingWindow(counts, coactivation_of(tokens, experts), tokens)


@st.composite
def problems(draw: st.DrawFn) -> tuple[RoutingWindow, Topology, int]:
    nodes = draw(st.sampled_from([1, 2, 3]))
    gpus = nodes * draw(st.sampled_from([1, 2, 4]))
    slots_per_gpu = draw(st.integers(1, 5))
    slots = gpus * slots_per_gpu
    experts = draw(st.integers(max(slots_per_gpu, slots // 2, 1), slots))
    k = draw(st.integers(1, min(experts, 8)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    tokens = skewed_tokens(rng, 2, draw(st.sampled_from([1, 70, 300])), experts, k)
    return window_of(tokens, experts), Topology(gpus, nodes), slots
