"""Server flags: defaults that follow from ``--eplb-algorithm affinity``, and errors at start-up instead of later."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_eplb_affinity.errors import InputError
from sglang_eplb_affinity.sglang_hooks import ALGORITHM

logger = logging.getLogger(__name__)

_NUM_EXPERTS_KEYS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
# Their top-k output has no ids (SGLang's BYPASSED and TRITON_KERNEL formats, layers/moe/topk.py).
_FUSED_TOP_K_BACKENDS = ("flashinfer_trtllm", "flashinfer_mxfp4", "triton_kernel", "experimental_sgl_trtllm")
_TOP_K_KEYS = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class MoeShape:
    """Of the served model. ``num_layers`` counts dense layers too, as SGLang's maps do; ``moe_layers`` are those with
    routed experts."""

    num_layers: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]

    @staticmethod
    def of(hf_config: Any) -> MoeShape | None:
        """From a Hugging Face configuration; None for a model without routed experts."""
        experts = _first_int(hf_config, _NUM_EXPERTS_KEYS)
        top_k = _first_int(hf_config, _TOP_K_KEYS)
        layers = _first_int(hf_config, ("num_hidden_layers", "num_layers"))
        if not experts or experts < 2 or not top_k or not layers:
            return None
        return MoeShape(layers, experts, top_k, tuple(layer for layer in range(layers) if _is_moe(hf_config, layer)))


def _is_moe(hf_config: Any, layer: int) -> bool:
    """DeepSeek: dense layers first, then every moe_layer_freq-th; Qwen: every decoder_sparse_step-th but the listed."""
    frequency = getattr(hf_config, "moe_layer_freq", 1)
    sparse = frequency[layer] if isinstance(frequency, list) else layer % max(frequency or 1, 1) == 0
    step = getattr(hf_config, "decoder_sparse_step", 1) or 1
    return bool(
        sparse
        and layer >= (getattr(hf_config, "first_k_dense_replace", 0) or 0)
        and (layer + 1) % step == 0
        and layer not in (getattr(hf_config, "mlp_only_layers", None) or ())
    )


def _first_int(config: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None


def known_algorithms() -> list[str]:
    from sglang.srt.eplb.eplb_algorithms import EplbAlgorithm

    return ["auto", *(member.name for member in EplbAlgorithm)]


def resolve(server_args: Any) -> None:
    name = server_args.eplb_algorithm
    if name not in known_algorithms():
        raise InputError(f"--eplb-algorithm {name}: unknown; known are {', '.join(known_algorithms())}")
    if name == ALGORITHM and not server_args.enable_eplb:
        server_args.enable_eplb = True
        logger.info("--eplb-algorithm affinity turns on --enable-eplb")
    if server_args.expert_affinity_sample_tokens < 1:
        raise InputError(
            f"--expert-affinity-sample-tokens {server_args.expert_affinity_sample_tokens}: must be at least 1"
        )
    if not server_args.eplb_affinity_max_load_increase >= 0:
        raise InputError(
            f"--eplb-affinity-max-load-increase {server_args.eplb_affinity_max_load_increase}: must be 0 or more"
        )
    if server_args.eplb_affinity_max_moves is not None and server_args.eplb_affinity_max_moves < 1:
        raise InputError(f"--eplb-affinity-max-moves {server_args.eplb_affinity_max_moves}: must be at least 1")
    if server_args.expert_load_log_passes < 0:
        raise InputError(f"--expert-load-log-passes {server_args.expert_load_log_passes}: must be 0 (off) or more")
    if server_args.expert_load_log_passes:
        server_args.enable_expert_affinity_recorder = True
    if server_args.enable_expert_affinity_recorder and server_args.expert_distribution_recorder_mode is None:
        server_args.expert_distribution_recorder_mode = "stat"


def records_affinity(server_args: Any) -> bool:
    return server_args.enable_expert_affinity_recorder or (
        server_args.enable_eplb and server_args.eplb_algorithm == ALGORITHM
    )


def check(server_args: Any) -> None:
    view = server_args._resolved()
    ours = server_args.enable_eplb and server_args.eplb_algorithm == ALGORITHM
    forced = server_args.ep_forced_routing
    if not ours and not records_affinity(server_args) and not forced and server_args.init_expert_location == "trivial":
        return
    shape = MoeShape.of(server_args.get_model_config().hf_text_config)
    if ours or records_affinity(server_args) or forced:
        flag = "--eplb-algorithm affinity" if ours else f"--ep-forced-routing {forced}"
        flag = flag if ours or forced else "--enable-expert-affinity-recorder"
        if shape is None:
            raise InputError(f"{flag}: {server_args.model_path} has no routed experts; leave the flag out")
        if view.moe_runner_backend in _FUSED_TOP_K_BACKENDS:
            raise InputError(
                f"--moe-runner-backend {view.moe_runner_backend}: chooses experts inside its kernel, so {flag} finds "
                "no ids; use another backend, such as triton or deep_gemm"
            )
        if server_args.expert_distribution_recorder_mode not in (None, "stat"):
            raise InputError(
                f"--expert-distribution-recorder-mode {server_args.expert_distribution_recorder_mode}: "
                f"{flag} needs mode stat; leave the flag out"
            )
    if ours and view.ep_size < 2:
        raise InputError(
            f"--eplb-algorithm affinity: needs expert parallelism, but the EP size is {view.ep_size}; "
            "give --ep-size of 2 or more (with --tp-size at least as large)"
        )
    if shape is None:
        return
    if forced:
        from sglang_eplb_affinity.sglang_hooks.forcing import make

        make(server_args, view.ep_size, view.moe_a2a_backend, "cpu", 0)
    slots = shape.num_experts + server_args.ep_num_redundant_experts
    if (ours or server_args.enable_eplb) and slots % view.ep_size:
        low = max(slots // view.ep_size * view.ep_size - shape.num_experts, -shape.num_experts % view.ep_size)
        raise InputError(
            f"--ep-num-redundant-experts {server_args.ep_num_redundant_experts}: with the model's {shape.num_experts} "
            f"experts this makes {slots} slots, which do not divide over EP size {view.ep_size}; "
            f"use {low} or {low + view.ep_size}"
        )
    nodes = server_args.eplb_affinity_nodes
    if ours and nodes is not None and (nodes < 1 or view.ep_size % nodes):
        raise InputError(f"--eplb-affinity-nodes {nodes}: must divide the EP size {view.ep_size}")
    if server_args.init_expert_location != "trivial":
        check_init_expert_location(server_args.init_expert_location, shape, slots)
    if ours:
        logger.info(
            "[eplb-affinity] EPLB on: rebalance every %d passes, dispatch %s, %d redundant experts, %d nodes, "
            "load at most %+.1f %% of EPLB's, %d tokens sampled per layer",
            server_args.eplb_rebalance_num_iterations,
            server_args.ep_dispatch_algorithm,
            server_args.ep_num_redundant_experts,
            nodes or server_args.nnodes,
            100 * server_args.eplb_affinity_max_load_increase,
            server_args.expert_affinity_sample_tokens,
        )


def check_init_expert_location(value: str, shape: MoeShape, num_slots: int) -> None:
    """Raise InputError unless the map or dump fits the model; the text after the flag says what differs."""
    from sglang_eplb_affinity.expert_map import ExpertMap

    flag = f"--init-expert-location {value if len(value) < 200 else value[:40] + '...'}"
    data = _read(value, flag)
    if not isinstance(data, dict) or not {"physical_to_logical_map", "logical_count"} & set(data):
        raise InputError(f"{flag}: has neither physical_to_logical_map nor logical_count")
    if "physical_to_logical_map" in data:
        found = data["physical_to_logical_map"]
        found = found.tolist() if hasattr(found, "tolist") else found
        expert_map = ExpertMap.from_json({"physical_to_logical_map": found}, shape.num_experts, source=flag)
        if (expert_map.num_layers, expert_map.num_slots) != (shape.num_layers, num_slots):
            raise InputError(
                f"{flag}: has {expert_map.num_layers} layers of {expert_map.num_slots} slots, but the model needs "
                f"{shape.num_layers} layers of {num_slots} (experts + --ep-num-redundant-experts)"
            )
        return
    import numpy as np

    try:
        count = np.asarray(data["logical_count"])
    except ValueError:
        raise InputError(f"{flag}: logical_count has rows of different length") from None
    if count.ndim not in (2, 3) or count.shape[-2:] != (shape.num_layers, shape.num_experts):
        raise InputError(
            f"{flag}: logical_count has shape {tuple(count.shape)}, but the model needs "
            f"[..., {shape.num_layers} layers, {shape.num_experts} experts]; is it another model's dump?"
        )


def _read(value: str, flag: str) -> Any:
    import torch

    try:
        if value.endswith(".pt"):
            return torch.load(value, weights_only=True, map_location="cpu")
        if value.endswith(".json"):
            return json.loads(Path(value).read_text())
        return json.loads(value)
    except OSError as error:
        raise InputError(f"{flag}: cannot be read ({error.strerror})") from None
    except Exception as error:  # torch.load and json raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise InputError(f"{flag}: not a readable .json, .pt or inline JSON ({reason})") from None
