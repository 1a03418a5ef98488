"""SGLang's own EPLB algorithm, loaded from the installed package without importing SGLang (which needs much else)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology


def upstream_rebalance() -> Callable[..., Any] | None:
    """``deepseek.rebalance_experts`` of the installed SGLang, or None."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0], "srt/eplb/eplb_algorithms/deepseek.py")
    if not path.is_file():
        return None
    module_spec = importlib.util.spec_from_file_location("sglang_deepseek_eplb", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.rebalance_experts


def upstream_version() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def upstream_map(
    rebalance: Callable[..., Any], counts: np.ndarray, topology: Topology, num_slots: int, hierarchical: bool
) -> ExpertMap:
    """SGLang's map for counts int64 [layers, experts]; hierarchical with one group of experts per node."""
    import torch

    physical, _, _ = rebalance(
        torch.from_numpy(counts), num_slots, topology.num_nodes, topology.num_nodes, topology.num_gpus, hierarchical
    )
    return ExpertMap(physical.numpy(), counts.shape[1])
