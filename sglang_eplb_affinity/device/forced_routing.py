"""Forced routing: the router's expert ids are replaced by exactly balanced ids or by those of a recorded trace.

It shows the most that perfect balance could gain (the idea of LightLLM's fake balance, PR 962), what fan-out costs at
one and the same balance, and realistic routing for models without their weights. Outputs are then not the model's.

Every mode is one table of ids, int16 [layers, rows, k], that does not depend on the shape of a batch. Token t of a
batch takes row (start + t) modulo rows; ``start`` advances by the tokens of each forward pass and lives on the device,
so a replayed CUDA graph goes on where the last pass ended. The router's weights stay as the model computed and
renormalised them; only ids change. Limits on a model's routing (DeepSeek's groups) are not kept by balanced ids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.domain.topology import Topology

FLAG = "--ep-forced-routing"
MODES = "balanced, balanced:spread, balanced:local or replay:TRACE.npz[,domain=NAME][,layers=cycle]"
NOT_THE_MODELS = "expert ids are forced, so outputs are not the model's"
_DRAWS = 16
_OPTION = re.compile(",(domain|layers)=")
_REPLAY = re.compile(r"(?P<trace>.+?)(,domain=(?P<domain>[^,]+))?(?P<cycle>,layers=cycle)?")


@dataclass(frozen=True)
class ForcedRoutingSpec:
    """A parsed flag. ``variant`` is "", "spread" or "local"; ``trace``, ``domain`` and ``cycle_layers`` belong to
    ``replay``: with the last, MoE layer i replays the trace's layer i modulo its layers."""

    value: str
    mode: str
    variant: str = ""
    trace: str = ""
    domain: str = ""
    cycle_layers: bool = False

    @staticmethod
    def parse(value: str) -> ForcedRoutingSpec:
        """Raises InputError that names the flag, the value and the known modes; no file is read."""
        mode, _, rest = value.partition(":")
        if mode == "balanced" and (rest in ("spread", "local") or value == "balanced"):
            return ForcedRoutingSpec(value, mode, variant=rest)
        if mode == "replay" and (match := _REPLAY.fullmatch(rest)) and not _OPTION.search(match["trace"]):
            return ForcedRoutingSpec(
                value, mode, trace=match["trace"], domain=match["domain"] or "", cycle_layers=bool(match["cycle"])
            )
        raise InputError(f"{FLAG} {value}: unknown; use {MODES}")


def balanced_order(variant: str, layer: int, num_experts: int, topology: Topology) -> np.ndarray:
    """int64 [experts]: the cyclic order in which a layer's assignments go round the experts.

    Any k consecutive entries are the experts of a token. ``local``: GPU by GPU, so that a token's experts share a GPU
    as far as the balance allows; ``spread``: GPUs and nodes in turn, so that they share none before all have one; both
    begin at another GPU in each layer. "": a random order, another in each layer.
    """
    if not variant:
        return np.random.default_rng((0x5EED, layer)).permutation(num_experts)
    per_gpu = topology.slots_per_gpu(num_experts)
    order = np.arange(num_experts)
    if variant == "spread":
        gpus = np.arange(topology.num_gpus).reshape(topology.num_nodes, -1).T.ravel()  # node by node in turn
        order = gpus[order % topology.num_gpus] * per_gpu + order // topology.num_gpus
    return np.roll(order, -layer * per_gpu)


def rows_of_order(order: np.ndarray, top_k: int) -> np.ndarray:
    """int16 [experts / gcd(experts, k), k]: consecutive runs of k, until the order begins anew."""
    rows = len(order) // math.gcd(len(order), top_k)
    positions = np.arange(rows * top_k).reshape(rows, top_k) % len(order)
    return order[positions].astype(np.int16)


def fanout(rows: np.ndarray, num_experts: int, topology: Topology) -> float:
    """Mean number of GPUs that a row's experts sit on, with experts placed contiguously."""
    gpus = rows.astype(np.int64) // topology.slots_per_gpu(num_experts)
    touched = np.zeros((len(rows), topology.num_gpus), bool)
    np.put_along_axis(touched, gpus, True, axis=1)
    return float(touched.sum(1).mean())


def random_fanout(num_experts: int, top_k: int, topology: Topology) -> float:
    """What :func:`fanout` would be on average for experts picked at random."""
    others = num_experts - topology.slots_per_gpu(num_experts)
    return topology.num_gpus * (1 - math.comb(others, top_k) / math.comb(num_experts, top_k))


def balanced_table(variant: str, num_layers: int, num_experts: int, top_k: int, topology: Topology) -> np.ndarray:
    """int16 [layers, rows, k] of which any run of rows, around the end too, uses every expert equally often, give or
    take one: the rows are a cyclic order of the experts, cut into runs of k. Of _DRAWS random orders of a layer the one
    whose fan-out is nearest to that of random routing is taken.
    """
    divides = num_experts % topology.num_gpus == 0
    if variant and not divides:
        raise InputError(
            f"{FLAG} balanced:{variant}: {num_experts} experts do not divide evenly over {topology.num_gpus} GPUs; "
            f"use {FLAG} balanced"
        )
    layers = []
    for layer in range(num_layers):
        if variant or not divides:
            layers.append(rows_of_order(balanced_order(variant, layer, num_experts, topology), top_k))
            continue
        chance = random_fanout(num_experts, top_k, topology)
        draws = [
            rows_of_order(balanced_order("", layer * _DRAWS + i, num_experts, topology), top_k) for i in range(_DRAWS)
        ]
        layers.append(min(draws, key=lambda rows: abs(fanout(rows, num_experts, topology) - chance)))
    return np.stack(layers)


def replay_table(spec: ForcedRoutingSpec, num_layers: int, num_experts: int, top_k: int) -> np.ndarray:
    """int16 [layers, tokens, k] of a trace that fits the model; raises InputError that says what does not."""
    trace = RoutingTrace.load(spec.trace)
    for name, has, wants in (
        ("MoE layers", num_layers if spec.cycle_layers else trace.num_layers, num_layers),
        ("experts", trace.num_experts, num_experts),
        ("experts a token (top-k)", trace.top_k, top_k),
    ):
        if has != wants:
            raise InputError(f"{spec.trace}: has {has} {name}, but the model has {wants}")
    ordered = np.sort(trace.topk_ids, axis=2)
    twice = np.argwhere(ordered[:, :, 1:] == ordered[:, :, :-1])
    if len(twice):
        token, layer, slot = twice[0]
        raise InputError(
            f"{spec.trace}: topk_ids[{token}, {layer}] has expert {ordered[token, layer, slot]} twice, "
            "but the experts of a token must be distinct"
        )
    if spec.domain:
        if trace.domain is None or spec.domain not in trace.domain_names:
            raise InputError(
                f"{spec.trace}: has no domain {spec.domain!r} (has: {', '.join(trace.domain_names) or 'no domains'})"
            )
        rows = trace.domain == trace.domain_names.index(spec.domain)
        if not rows.any():
            raise InputError(f"{spec.trace}: domain {spec.domain!r} has no tokens")
        trace = trace.select(rows)
    table = np.ascontiguousarray(trace.topk_ids.transpose(1, 0, 2), dtype=np.int16)
    return table[np.arange(num_layers) % trace.num_layers]


def reference_ids(rows: torch.Tensor, start: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """What the kernel writes: ids [num_tokens, k] of one layer's rows [rows, k] from row ``start`` int64 [1] on."""
    token = torch.arange(num_tokens, device=rows.device)
    return rows[(start + token) % len(rows)]


class ForcedRouting:
    """Writes forced ids over the router's, layer by layer, without waiting for the device."""

    def __init__(
        self, table: np.ndarray, moe_layers: Sequence[int], *, device: torch.device | str, first_row: int = 0,
        by_real_tokens: bool = False, value: str = "",
    ) -> None:  # fmt: skip
        """``table`` int16 [len(moe_layers), rows, k]; the rest as in :meth:`from_flag`."""
        self.value = value
        self._table = torch.from_numpy(table).to(device)
        self._index_of_layer = {layer: index for index, layer in enumerate(moe_layers)}
        self._start = torch.zeros(1, dtype=torch.int64, device=device)
        self._next = torch.full((1,), first_row, dtype=torch.int64, device=device)
        self._by_real_tokens = by_real_tokens
        self._first_index = len(moe_layers)

    @staticmethod
    def from_flag(
        value: str,
        *,
        moe_layers: Sequence[int],
        num_experts: int,
        top_k: int,
        topology: Topology,
        device: torch.device | str,
        contiguous: bool = True,
        own_tokens: bool = False,
        rank: int = 0,
    ) -> ForcedRouting:
        """From ``--ep-forced-routing``; raises InputError, in one line, for a value or trace that does not fit.

        ``moe_layers``: the model's ids of its layers with routed experts. ``top_k``: routed experts a token, without
        fused shared ones. ``contiguous``: no redundant experts and no rebalancing, so that logical expert e sits on GPU
        e // (experts / GPUs) (spread and local need it). ``own_tokens``: each rank routes tokens of its own (there is
        an all-to-all backend); ranks then start at different rows and advance by their real tokens. Otherwise all
        ranks route the same batch, must choose the same ids, and advance by its rows.
        """
        spec = ForcedRoutingSpec.parse(value)
        if top_k > num_experts:
            raise InputError(f"{FLAG} {value}: top-k {top_k} is larger than the model's {num_experts} experts")
        if spec.variant and not contiguous:
            raise InputError(
                f"{FLAG} {value}: needs experts where the model has them; leave out --enable-eplb, "
                "--ep-num-redundant-experts and --init-expert-location"
            )
        try:
            if spec.mode == "balanced":
                table = balanced_table(spec.variant, len(moe_layers), num_experts, top_k, topology)
            else:
                table = replay_table(spec, len(moe_layers), num_experts, top_k)
        except InputError as error:
            text = str(error)
            raise InputError(text if text.startswith(FLAG) else f"{FLAG} {value}: {text}") from None
        # Evenly apart, so that what the ranks' batches leave over does not fall on the same experts.
        first_row = rank * table.shape[1] // topology.num_gpus if own_tokens else 0
        return ForcedRouting(
            table, moe_layers, device=device, first_row=first_row, by_real_tokens=own_tokens, value=value
        )

    @property
    def top_k(self) -> int:
        return int(self._table.shape[2])

    def apply(
        self, layer_id: int | None, topk_ids: torch.Tensor, num_token_non_padded: torch.Tensor | None = None
    ) -> None:
        """Overwrite the first top_k columns of ``topk_ids`` [tokens, >= top_k] in place, with logical ids.

        ``num_token_non_padded``: int [1] on the device, the batch's real tokens, if it has padding. Layers that are not
        in ``moe_layers`` (a draft model's) are left alone. A rank's first MoE layer begins the pass.
        """
        index = self._index_of_layer.get(-1 if layer_id is None else layer_id)
        if index is None:
            return
        if index <= self._first_index:
            self._first_index = index
            self._begin_pass(topk_ids.shape[0], num_token_non_padded)
        if topk_ids.shape[0] == 0:
            return
        if topk_ids.is_cuda:
            from sglang_eplb_affinity.device.triton.forced_routing_kernel import write_ids

            write_ids(self._table[index], self._start, topk_ids)
        else:
            topk_ids[:, : self.top_k] = reference_ids(self._table[index], self._start, len(topk_ids)).to(topk_ids.dtype)

    def _begin_pass(self, num_rows: int, num_token_non_padded: torch.Tensor | None) -> None:
        self._start.copy_(self._next)
        if self._by_real_tokens and num_token_non_padded is not None:
            self._next.add_(num_token_non_padded.reshape(1))
        else:
            self._next.add_(num_rows)

    def describe(self) -> dict[str, str]:
        """For the start-up log, /server_info and result rows."""
        return {"ep_forced_routing": self.value, "ep_forced_routing_note": NOT_THE_MODELS}
