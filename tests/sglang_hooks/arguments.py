"""A server's arguments without a server: those of a small model with group-limited routing on two GPUs."""

from types import SimpleNamespace
from typing import Any

TEXT = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3, "first_k_dense_replace": 1}


def server_arguments(**flags: Any) -> Any:
    config = SimpleNamespace(
        hf_config=SimpleNamespace(n_group=2, architectures=["Model"]),
        hf_text_config=SimpleNamespace(**TEXT),
        context_len=4096,
    )
    defaults = dict(
        enable_expert_affinity_recorder=False, ep_forced_routing=None, eplb_affinity_further_slots=0,
        eplb_affinity_incremental=False,
        eplb_affinity_max_load_increase=0.01, eplb_affinity_max_moves=None, eplb_affinity_nodes=None,
        eplb_affinity_p95_allowance=None,
        eplb_affinity_phase=None, eplb_affinity_primary_tokens=None, eplb_affinity_survive="none", eplb_async=False,
        disaggregation_mode="null",
        eplb_async_layers_in_flight=2, eplb_async_phase_limit=60.0, eplb_async_run_once=False,
        eplb_async_warm_up_passes=0, eplb_min_gain=0.02, eplb_record_map=None, expert_affinity_record_every=1,
        expert_affinity_record_last_passes=None, expert_affinity_sample_tokens=8192, expert_load_log_passes=0,
        chunked_prefill_size=4096, deepep_mode="auto", device="cpu", dp_size=1, elastic_ep_backend=None,
        enable_dp_attention=False, enable_eplb=True, enable_expert_distribution_metrics=False, enable_metrics=False,
        ep_dispatch_algorithm="dynamic", ep_num_redundant_experts=2, ep_size=2, eplb_algorithm="affinity",
        eplb_rebalance_num_iterations=1000, extra_metric_labels=None, init_expert_location="trivial",
        max_prefill_tokens=16384,
        model_path="org/model", moe_a2a_backend="none", nnodes=1, node_rank=0, random_seed=None,
        served_model_name=None, speculative_algorithm=None,
    )  # fmt: skip
    return SimpleNamespace(**defaults | flags, get_model_config=lambda: config)
