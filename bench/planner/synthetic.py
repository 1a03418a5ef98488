"""Synthetic routing with skew and co-activation, for sizes of which there is no recorded trace."""

from __future__ import annotations

import numpy as np

from sglang_eplb_affinity.domain.routing import RoutingTrace

TOPICS = 16
SEQUENCE_TOKENS = 128


def synthetic_trace(num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int = 0) -> RoutingTrace:
    """Top-k of (expert popularity + affinity of the sequence's topic + noise), independent by layer.

    Sequences of 128 tokens share a topic, so loads vary over time and experts of a topic fire together.
    """
    rng = np.random.default_rng(seed)
    sequence = np.arange(num_tokens, dtype=np.int32) // SEQUENCE_TOKENS
    topic_of_sequence = rng.integers(0, TOPICS, size=int(sequence[-1]) + 1)
    topic = topic_of_sequence[sequence]
    ids = np.empty((num_tokens, num_layers, top_k), np.int16)
    for layer in range(num_layers):
        popularity = rng.normal(0, 0.5, size=num_experts).astype(np.float32)
        affinity = rng.normal(0, 1.0, size=(TOPICS, num_experts)).astype(np.float32)
        noise = rng.gumbel(size=(num_tokens, num_experts)).astype(np.float32)
        scores = popularity + affinity[topic] + noise
        ids[:, layer] = np.argpartition(-scores, top_k, axis=1)[:, :top_k]
    return RoutingTrace(ids, num_experts, sequence, source="synthetic trace")
