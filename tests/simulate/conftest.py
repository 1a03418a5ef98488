"""A recording with structure: topics that use few experts together, skewed load, two domains that differ."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.simulate.source import RoutingSource
from sglang_eplb_affinity.simulate.system import load_system


def make_trace(
    num_experts: int = 16, top_k: int = 4, tokens: int = 4096, layers: int = 3, seed: int = 0
) -> RoutingTrace:
    """Topic i prefers experts i, i + topics, ...; the first topics are the more frequent ones."""
    rng = np.random.default_rng(seed)
    topics = num_experts // top_k
    sequence = np.arange(tokens) // 64
    domain = (sequence % 2).astype(np.int8)
    topic = np.minimum(rng.geometric(0.45, tokens) - 1, topics - 1)
    topic = np.where(domain == 1, topics - 1 - topic, topic)
    ids = np.empty((tokens, layers, top_k), np.int16)
    for layer in range(layers):
        place = np.random.default_rng(layer).permutation(num_experts)
        score = rng.gumbel(size=(tokens, num_experts))
        score += 4.0 * (np.arange(num_experts)[None, :] % topics == topic[:, None])
        ids[:, layer] = place[np.argsort(-score, axis=1)[:, :top_k]]
    return RoutingTrace(ids, num_experts, sequence.astype(np.int32), domain, ("a", "b"), "made.npz")


@pytest.fixture
def trace() -> RoutingTrace:
    return make_trace()


SYSTEM = """
name: toy
description: two nodes of four
cluster: {gpus: 8, gpus_per_node: 4, nvlink_gb_per_s: 200, rdma_gb_per_s: 50, calibration: h800-cx7}
gpu: {name: H800, hbm_gb_per_s: 3350, expert_tflops: 1979, bf16_tflops: 989}
model:
  name: toy
  layers: 3
  dense_layers: 0
  experts: 16
  top_k: 4
  hidden: 4096
  intermediate: 512
  shared_experts: 0
  dense_intermediate: 0
  expert_groups: 1
  groups_per_token: 1
  expert_bytes_per_weight: 1
  dispatch_dtype: fp8
  attention_mparams: 20
  attention_bytes_per_weight: 1
  kv_bytes_per_token: 1024
  decode_flops_per_pair: 8192
  prefill_flops_per_pair: 8192
serving:
  redundant_experts: 0
  prefill_tokens_per_gpu: 512
  decode_batch_per_gpu: 64
  prompt_tokens: 1024
  context_tokens: 1024
  prefill_mode: normal
  decode_mode: low_latency
  overlap: none
  other_ms_per_step: 0
"""


@pytest.fixture
def system_file(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(SYSTEM)
    return path


@pytest.fixture
def system(system_file):
    return load_system(str(system_file))


@pytest.fixture
def source(trace, system):
    return RoutingSource(trace, None, system.model, np.arange(3))
