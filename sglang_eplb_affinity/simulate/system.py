"""The system that is simulated: cluster, GPU, model and serving, from a small YAML file or a preset."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from sglang_eplb_affinity.domain.content import parse_yaml
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.topology import Topology

DeepEPMode = Literal["normal", "low_latency", "v2"]
Overlap = Literal["none", "two_batch"]


@dataclass(frozen=True)
class Cluster:
    """GPUs and links. Bandwidths in GB/s (1e9 bytes) for each GPU and direction; ``rdma`` is that of a GPU's own NIC.

    ``calibration`` names the DeepEP measurements that give the achieved share of these links.
    """

    gpus: int
    gpus_per_node: int
    nvlink_gb_per_s: float
    rdma_gb_per_s: float
    calibration: str


@dataclass(frozen=True)
class Gpu:
    """Peak rates: ``hbm`` in GB/s; dense TFLOPS for the expert weights' dtype and for bf16."""

    name: str
    hbm_gb_per_s: float
    expert_tflops: float
    bf16_tflops: float


@dataclass(frozen=True)
class Model:
    """Sizes that decide time. Attention runs data parallel, one replica of its weights on each GPU.

    ``expert_groups`` and ``groups_per_token``: group-limited routing as in DeepSeek-V3 (1 and 1: none).
    ``expert_bytes_per_weight``: 1 for FP8, 2 for bf16, 0.53 for MXFP4 with its scales.
    ``attention_mparams``: millions of weights of attention in one layer; ``kv_bytes_per_token``: KV cache read for each
    context token and layer; ``decode_flops_per_pair`` and ``prefill_flops_per_pair``: flops of one query token against
    one context token in one layer (they differ for MLA).
    """

    name: str
    layers: int
    dense_layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    shared_experts: int
    dense_intermediate: int
    expert_groups: int
    groups_per_token: int
    expert_bytes_per_weight: float
    dispatch_dtype: Literal["fp8", "bf16"]
    attention_mparams: float
    attention_bytes_per_weight: float
    kv_bytes_per_token: float
    decode_flops_per_pair: float
    prefill_flops_per_pair: float

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers

    @property
    def num_groups(self) -> int | None:
        """As planners take it: None without group-limited routing."""
        return self.expert_groups if self.expert_groups > 1 else None

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down projections."""
        return 3 * self.hidden * self.intermediate

    @property
    def expert_bytes(self) -> float:
        return self.expert_weights * self.expert_bytes_per_weight

    @property
    def dispatch_bytes(self) -> float:
        """Payload of one token copy; FP8 carries a float32 scale for 128 values."""
        return self.hidden * (1 + 4 / 128) if self.dispatch_dtype == "fp8" else self.hidden * 2.0

    @property
    def combine_bytes(self) -> float:
        return self.hidden * 2.0


@dataclass(frozen=True)
class Serving:
    """``prefill_tokens_per_gpu``: tokens of one prefill step; ``decode_batch_per_gpu``: running requests.

    Modes: DeepEP V1's two, and ``v2``, DeepEP V2's ElasticBuffer.
    ``overlap``: ``two_batch`` hides communication of one half batch behind the computation of the other.
    ``other_ms_per_step``: scheduler, sampling and output head.
    """

    redundant_experts: int
    prefill_tokens_per_gpu: int
    decode_batch_per_gpu: int
    prompt_tokens: int
    context_tokens: int
    prefill_mode: DeepEPMode
    decode_mode: DeepEPMode
    overlap: Overlap
    other_ms_per_step: float


@dataclass(frozen=True)
class System:
    name: str
    description: str
    cluster: Cluster
    gpu: Gpu
    model: Model
    serving: Serving

    def __post_init__(self) -> None:
        c, m = self.cluster, self.model

        def fail(field: str, value: Any, wanted: str) -> None:
            raise InputError(f"{self.name}: {field} is {value!r}, but must be {wanted}")

        for part in (c, self.gpu, m, self.serving):
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                may_be_zero = field.name in _MAY_BE_ZERO
                if isinstance(value, int | float) and (value < 0 or (value == 0 and not may_be_zero)):
                    fail(field.name, value, "0 or more" if may_be_zero else "more than 0")
        if c.gpus % c.gpus_per_node and c.gpus > c.gpus_per_node:
            fail("cluster.gpus", c.gpus, f"a multiple of gpus_per_node ({c.gpus_per_node}), or less")
        if m.top_k > m.experts:
            fail("model.top_k", m.top_k, f"at most the number of experts ({m.experts})")
        if m.experts % m.expert_groups or not 1 <= m.groups_per_token <= m.expert_groups:
            fail("model.expert_groups", m.expert_groups, "a divisor of experts, and at least groups_per_token")
        if self.serving.overlap == "two_batch" and "v2" in (self.serving.prefill_mode, self.serving.decode_mode):
            fail("serving.overlap", "two_batch", "none with mode v2: SGLang has no two-batch overlap for DeepEP V2")
        if m.dense_layers >= m.layers:
            fail("model.dense_layers", m.dense_layers, f"less than layers ({m.layers})")
        self.topology.slots_per_gpu(self.num_slots)

    @cached_property
    def topology(self) -> Topology:
        nodes = max(1, self.cluster.gpus // self.cluster.gpus_per_node)
        return Topology(self.cluster.gpus, nodes)

    @property
    def num_slots(self) -> int:
        return self.model.experts + self.serving.redundant_experts

    def resized(self, gpus: int, redundant: int | None = None) -> System:
        """The same on another number of GPUs; redundant experts are raised to the next number that divides.

        Raises InputError for what ``--gpus`` and ``--redundant`` cannot be.
        """
        if gpus < 1:
            raise InputError(f"--gpus {gpus}: must be at least 1")
        experts, most = self.model.experts, self.model.experts * (gpus - 1)
        if redundant is not None and not 0 <= redundant <= most:
            raise InputError(
                f"--redundant {redundant}: must be 0 to {most}, which puts each of {experts} experts on all {gpus} GPUs"
            )
        if redundant is not None and (experts + redundant) % gpus:
            fits = divisible_redundancy(experts, gpus, redundant)
            raise InputError(
                f"--redundant {redundant}: with {experts} experts this makes {experts + redundant} slots, which do not "
                f"divide evenly over {gpus} GPUs; use {fits}"
            )
        wanted = self.serving.redundant_experts if redundant is None else redundant
        if redundant is None:
            wanted = divisible_redundancy(self.model.experts, gpus, wanted)
        return dataclasses.replace(
            self,
            cluster=dataclasses.replace(self.cluster, gpus=gpus),
            serving=dataclasses.replace(self.serving, redundant_experts=wanted),
        )


_MAY_BE_ZERO = {
    "rdma_gb_per_s",
    "dense_layers",
    "shared_experts",
    "dense_intermediate",
    "redundant_experts",
    "other_ms_per_step",
    "decode_flops_per_pair",
    "prefill_flops_per_pair",
    "kv_bytes_per_token",
}


def divisible_redundancy(experts: int, gpus: int, at_least: int) -> int:
    """The smallest number of redundant experts >= ``at_least`` with which the slots divide over the GPUs."""
    return at_least + (-(experts + at_least)) % gpus


def preset_names() -> list[str]:
    folder = resources.files("sglang_eplb_affinity.simulate") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_system(name_or_path: str) -> System:
    """A preset by name, or a YAML file; raises InputError naming the field that is wrong."""
    if name_or_path in preset_names():
        folder = resources.files("sglang_eplb_affinity.simulate") / "presets"
        return _parse((folder / f"{name_or_path}.yaml").read_text(), name_or_path)
    path = Path(name_or_path)
    if not path.suffix:
        raise InputError(f"--topology: no preset {name_or_path!r} (presets: {', '.join(preset_names())})")
    try:
        return _parse(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not text'})") from None


def _parse(text: str, source: str) -> System:
    data = parse_yaml(text, source)
    if not isinstance(data, dict):
        raise InputError(f"{source}: expected a table with cluster, gpu, model and serving")
    parts = {"cluster": Cluster, "gpu": Gpu, "model": Model, "serving": Serving}
    unknown = set(data) - set(parts) - {"name", "description"}
    if unknown:
        raise InputError(f"{source}: unknown entry {sorted(unknown)[0]!r}; known are {', '.join(parts)}")
    made = {name: _build(cls, data.get(name), f"{source}: {name}") for name, cls in parts.items()}
    return System(str(data.get("name", source)), str(data.get("description", "")), **made)


def _build(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where}: missing, or not a table")
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in values:
            raise InputError(f"{where}.{name}: missing")
    for name in values:
        if name not in names:
            raise InputError(f"{where}.{name}: unknown; known are {', '.join(names)}")
    return cls(**{name: _typed(values[name], hints[name], f"{where}.{name}") for name in names})


def _typed(value: Any, kind: Any, where: str) -> Any:
    if get_args(kind):
        if value not in get_args(kind):
            raise InputError(f"{where}: {value!r} is not one of {', '.join(map(str, get_args(kind)))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{where}: {value!r} must be a {'whole number' if kind is int else kind.__name__}")
    return value
