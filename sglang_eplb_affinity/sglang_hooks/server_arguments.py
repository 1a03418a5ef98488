"""What this package reads of SGLang's server arguments: the contract that each version's adapter keeps."""

from __future__ import annotations

from typing import Any, Literal, Protocol

ALGORITHM = "affinity"
INITIAL_MAP = "--init-expert-location"
DEFAULT_MIN_GAIN = 0.02  # of --eplb-min-gain, as the series has it
# What the patch series adds to SGLang's ServerArgs.
ADDED = (
    "enable_expert_affinity_recorder",
    "ep_forced_routing",
    "eplb_affinity_further_slots",
    "eplb_affinity_incremental",
    "eplb_affinity_max_load_increase",
    "eplb_affinity_max_moves",
    "eplb_affinity_nodes",
    "eplb_affinity_p95_allowance",
    "eplb_affinity_phase",
    "eplb_affinity_primary_tokens",
    "eplb_affinity_survive",
    "eplb_async",
    "eplb_async_layers_in_flight",
    "eplb_min_gain",
    "eplb_async_phase_limit",
    "eplb_async_run_once",
    "eplb_async_warm_up_passes",
    "eplb_record_map",
    "expert_affinity_record_every",
    "expert_affinity_record_last_passes",
    "expert_affinity_sample_tokens",
    "expert_load_log_passes",
)


class ServerArguments(Protocol):
    """Flags by SGLang 0.5.17's names, resolved as far as SGLang has got; an assignment takes effect in SGLang."""

    # the series'
    enable_expert_affinity_recorder: bool
    ep_forced_routing: str | None
    eplb_affinity_further_slots: int
    eplb_affinity_incremental: bool
    eplb_affinity_max_load_increase: float
    eplb_affinity_max_moves: int | None
    eplb_affinity_nodes: int | None
    eplb_affinity_p95_allowance: float | None
    eplb_affinity_phase: Literal["prefill", "decode", "both"] | None
    eplb_affinity_primary_tokens: int | None
    eplb_affinity_survive: Literal["none", "rank", "node"]
    eplb_async: bool
    eplb_async_layers_in_flight: int
    eplb_async_phase_limit: float
    eplb_async_run_once: bool
    eplb_async_warm_up_passes: int
    eplb_min_gain: float
    eplb_record_map: str | None
    expert_affinity_record_every: int
    expert_affinity_record_last_passes: int | None
    expert_affinity_sample_tokens: int
    expert_load_log_passes: int
    # SGLang's own
    chunked_prefill_size: int | None
    deepep_mode: str
    device: str
    disaggregation_mode: str
    dp_size: int
    elastic_ep_backend: str | None
    enable_dp_attention: bool
    enable_eplb: bool
    enable_expert_distribution_metrics: bool
    enable_lora: bool | None
    enable_memory_saver: bool
    enable_metrics: bool
    enable_pdmux: bool
    ep_dispatch_algorithm: str | None
    ep_num_redundant_experts: int
    ep_size: int
    eplb_algorithm: str
    eplb_min_rebalancing_utilization_threshold: float
    eplb_rebalance_layers_per_chunk: int | None
    eplb_rebalance_num_iterations: int
    expert_distribution_recorder_buffer_size: int | None
    expert_distribution_recorder_mode: str | None
    extra_metric_labels: dict[str, str] | None
    init_expert_location: str
    lora_target_modules: Any
    max_ep_size: int | None
    max_prefill_tokens: int
    model_path: str
    moe_a2a_backend: str
    moe_runner_backend: str
    nnodes: int
    node_rank: int
    pp_size: int
    random_seed: int | None
    served_model_name: str | None
    speculative_algorithm: str | None
    tp_size: int
    weight_cache_mode: str

    def get_model_config(self) -> Any:
        """SGLang's ModelConfig, with ``context_len``, ``hf_config`` and ``hf_text_config``."""
