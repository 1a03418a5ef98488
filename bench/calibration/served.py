"""The time model's steps of a profile's servers: the maps that they serve, on the trace that they replay.

Of passes it predicts what the rows call `full_prefill_ms` and `decode_step_ms`. Of requests that come and go in a
closed loop it predicts their median TPOT and QPS from passes alone: while a request decodes its n tokens, each of the
other requests in flight is prefilled once, in at most n passes (after a decode step there is one for all that ended
with it). There is no queueing in it, and no cost of host, HTTP or client but `other_ms_per_step`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines.emulated_link.copies import combine_bytes, dispatch_bytes
from bench.harness.arms import ARMS
from bench.harness.links import Link
from bench.harness.profile import DECODE, PREFILL, LoadConfig, Profile
from bench.harness.static_maps import replayed_trace, rule_of
from sglang_eplb_affinity.dispatch.rules import DispatchRule
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.simulate.scenario import mode_of, served_rule
from sglang_eplb_affinity.simulate.system import Cluster, DeepEPMode, Model, Serving, System, load_system
from sglang_eplb_affinity.simulate.timing import LayerTime, TimeModel
from sglang_eplb_affinity.simulate.traffic import (
    LATENCY_NVLINK_IN,
    LATENCY_NVLINK_OUT,
    LATENCY_RDMA_OUT,
    NORMAL_FORWARDED,
    NORMAL_LOCAL,
    NORMAL_NVLINK_OUT,
    NORMAL_RDMA_OUT,
    NORMAL_RECEIVED,
    BatchTraffic,
    batch_traffic,
)

PRESET = "deepseek-v3-h200"  # its GPU, links, calibration and other_ms_per_step
PASSES = 4  # of other places of the trace
STAGES = ("dispatch_us", "experts_us", "combine_us", "rest_us")


@dataclass(frozen=True)
class Pass:
    """``step_ms`` of a whole pass; of a layer the stages in us (dispatch, experts, combine, the rest), what is waited
    for an emulated link, and the GPU fan-out; means over layers and passes."""

    step_ms: float
    stages: tuple[float, ...]
    link_us: float
    gpu_fanout: float


def model_of(folder: str, name: str) -> Model:
    """Sizes of a Qwen3Moe in bf16 whose layers all have experts; raises InputError for another model."""
    try:
        config: dict[str, Any] = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    if config.get("model_type") != "qwen3_moe":
        raise InputError(f"{name}: the prediction knows models of random:KEY=N,... only")
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    kv = config["num_key_value_heads"]
    return Model(
        name, config["num_hidden_layers"], 0, config["num_experts"], config["num_experts_per_tok"], hidden,
        config["moe_intermediate_size"], 0, 0, 1, 1, 2.0, "bf16",
        attention_mparams=2 * hidden * size * (heads + kv) / 1e6, attention_bytes_per_weight=2.0,
        kv_bytes_per_token=4.0 * kv * size, decode_flops_per_pair=4.0 * heads * size,
        prefill_flops_per_pair=4.0 * heads * size,
    )  # fmt: skip


def one_domain(traffic: BatchTraffic, top_k: int) -> BatchTraffic:
    """The same choices with all GPUs on one NVLink: what DeepEP moves where nodes are emulated."""
    counters = traffic.counters.copy()
    received, local = counters[NORMAL_RECEIVED], counters[NORMAL_LOCAL]
    gpus = counters.shape[1]
    counters[NORMAL_FORWARDED] = received.sum() // gpus
    counters[NORMAL_NVLINK_OUT] = (received - local).sum() // gpus
    counters[NORMAL_RDMA_OUT : NORMAL_RDMA_OUT + 2] = 0  # out of and into
    counters[LATENCY_NVLINK_IN] = traffic.gpu_load
    counters[LATENCY_NVLINK_OUT] = traffic.num_tokens * top_k // gpus
    counters[LATENCY_RDMA_OUT : LATENCY_RDMA_OUT + 2] = 0
    return replace(traffic, counters=counters)


class ServedModel:
    """Predicts the rows of ``profile``, whose arms serve ``maps`` (none: SGLang's trivial map)."""

    def __init__(self, profile: Profile, model_folder: str, maps: dict[str, Path]) -> None:
        self.profile, self.maps, self.ranks = profile, maps, profile.server.ranks
        self.link, self.model = Link.of(profile), model_of(model_folder, profile.server.model)
        self._topology = Topology(self.ranks, profile.server.nodes)
        trace = replayed_trace(profile.server)
        if trace is None or not profile.server.plan_trace:
            raise InputError(f"{profile.name}: only profiles with a plan_trace and replayed routing can be predicted")
        self._trace: RoutingTrace = trace
        self._passes = lru_cache(None)(self._pass)

    @cached_property
    def chunk(self) -> int:
        """Tokens of a rank in a full prefill pass."""
        return int(dict(pairwise(self.profile.server.flags))["--chunked-prefill-size"]) // self.ranks

    def of_load(self, load: LoadConfig, concurrency: int, arm: str) -> Iterator[tuple[str, int, float, Pass | None]]:
        """(metric, tokens of a rank in a pass, predicted value, the pass that it is of)."""
        sizes = load.exact_input_tokens or round(sum(load.input_tokens) / 2)
        if load.kind == PREFILL:
            found = self._passes(arm, self.chunk, True, sizes)
            yield "full_prefill_ms", self.chunk, found.step_ms, found
            return
        out, batch = load.output_tokens, max(1, concurrency // self.ranks)
        step = self._passes(arm, batch, False, sizes + out // 2)
        if load.kind == DECODE:
            yield "decode_step_ms", batch, step.step_ms, step
            return
        prefills = min(concurrency, out)
        tokens = concurrency * sizes / prefills / self.ranks
        part = self._passes(arm, max(1, min(self.chunk, round(tokens))), True, sizes)
        cycle = prefills * max(1.0, tokens / self.chunk) * part.step_ms + out * step.step_ms
        yield "p50_tpot_ms", batch, cycle / out, None
        yield "qps", batch, 1e3 * concurrency / cycle, None

    def _system(self, tokens: int, context: int) -> System:
        preset = load_system(PRESET)
        cluster = Cluster(self.ranks, self.ranks, preset.cluster.nvlink_gb_per_s, 0.0, preset.cluster.calibration)
        gpu = replace(preset.gpu, expert_tflops=preset.gpu.bf16_tflops)
        serving = Serving(
            0, tokens, tokens, context, context, "normal", "low_latency", "none", preset.serving.other_ms_per_step
        )
        return System(self.profile.name, "", cluster, gpu, self.model, serving)

    def _pass(self, arm: str, tokens: int, prefill: bool, context: int) -> Pass:
        system = self._system(tokens, context)
        model, mode = TimeModel(system), mode_of(system, "prefill" if prefill else "decode")
        path = self.maps.get(arm)
        layers, experts = self._trace.topk_ids.shape[1], self.model.experts
        served = ExpertMap.contiguous(layers, experts, experts)
        if path is not None:
            served = ExpertMap.from_json(json.loads(path.read_text()), experts)
        asked: Any = rule_of(self.profile.server, ARMS[arm])
        redundant = 0 if ARMS[arm].primary_tokens == 0 else served.num_slots - experts  # 0: no pass is small
        filled = replace(system, serving=replace(system.serving, redundant_experts=redundant))
        rule = served_rule(asked if path is not None else "static", filled, tokens, mode)
        times, waits, fans = [], [], []
        for number in range(PASSES):
            ids = self._tokens(tokens, number)
            for layer in range(layers):
                time, wait, fan = self._layer(model, ids[:, layer], served, layer, rule, mode, tokens)
                times.append(time)
                waits.append(wait)
                fans.append(fan)
        step_ms = model.step_ms(times, None, prefill, tokens) + self.model.layers * float(np.mean(waits)) / 1e3
        stages = tuple(float(np.mean([getattr(time, stage) for time in times])) for stage in STAGES)
        return Pass(step_ms, stages, float(np.mean(waits)), float(np.mean(fans)))

    def _layer(
        self, model: TimeModel, ids: np.ndarray, served: ExpertMap, layer: int, rule: DispatchRule, mode: DeepEPMode,
        tokens: int,
    ) -> tuple[LayerTime, float, float]:  # fmt: skip
        source = np.repeat(np.arange(self.ranks, dtype=np.int32), tokens)
        traffic = batch_traffic(ids, source, served, layer, self._topology, rule)
        alone = one_domain(traffic, self.model.top_k)
        return model.layer(alone, 1.0, mode, mode == "normal", tokens), self._wait_us(traffic, mode), traffic.gpu_fanout

    def _wait_us(self, traffic: BatchTraffic, mode: DeepEPMode) -> float:
        """Of the GPU that sends most to other nodes, after dispatch and after combine."""
        if not self.link.emulated:
            return 0.0
        per_expert = mode == "low_latency"
        copies = traffic.counters[LATENCY_RDMA_OUT if per_expert else NORMAL_RDMA_OUT].max()
        size = self.model.hidden, self.model.top_k
        size_of_copy = dispatch_bytes(*size, False, per_expert) + combine_bytes(*size, per_expert)
        return float(copies * size_of_copy / self.link.gb_per_s / 1e3)

    def _tokens(self, tokens: int, number: int) -> np.ndarray:
        """int16 [ranks * tokens, layers, k]: each rank reads the trace from a place of its own."""
        rows = self._trace.num_tokens
        starts = np.random.default_rng(number).integers(rows) + np.arange(self.ranks) * rows // self.ranks
        picked = (starts[:, None] + np.arange(tokens)).ravel() % rows
        return np.ascontiguousarray(self._trace.topk_ids[picked], dtype=np.int16)
