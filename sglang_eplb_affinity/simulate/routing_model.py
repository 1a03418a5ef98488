"""Routing of a model that nobody recorded, made from the recording of another: labelled "simulated routing" everywhere.

The model of one recorded layer: every token belongs to one of M latent groups (k-means on its expert set), and a group
has a weight for each expert; a token draws its experts without replacement in proportion to the weights (the
Plackett-Luce model, which is what top-k of logits with Gumbel noise is). Weights come from how often the group uses an
expert: p = 1 - exp(-w) inverted.

A larger model gets each expert from a recorded parent expert: the children of a parent share its weight in each group,
times a log-normal factor of spread ``child_spread`` for the child (skew between children) and one for child and group
(children specialise). Group-limited models (DeepSeek-V3) pick the best groups of experts first, by the sum of their two
best scores. Tokens keep the latent groups of recorded tokens, in their order and sequences, so that domains, repetition
in time and the tie between layers stay as recorded.

What it keeps and what it loses is measured by :func:`fidelity` in :mod:`.fidelity`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError, missing_package
from sglang_eplb_affinity.domain.numba_kernel import kernel
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.simulate.system import Model

GROUPS = 48
FIT_TOKENS = 12288
SMOOTHING = 4.0
CHILD_SPREAD = 0.75
MOST_REDRAWS = 256
"""Draws of a token until those that are left are drawn among the experts that it does not have."""


@dataclass(frozen=True)
class LayerGroups:
    """One recorded layer: ``labels`` int16 [tokens], each token's group; ``weights`` float64 [groups, experts]."""

    labels: np.ndarray
    weights: np.ndarray


def fit_layer(ids: np.ndarray, num_experts: int, groups: int = GROUPS, seed: int = 0) -> LayerGroups:
    """Latent groups of one layer from ``ids`` int [tokens, k]."""
    try:
        from scipy.cluster.vq import kmeans2
    except ImportError:
        raise missing_package("routing of a model that was not recorded", "SciPy", "simulate") from None

    hot = np.zeros((len(ids), num_experts), np.float32)
    np.put_along_axis(hot, ids.astype(np.int64), 1.0, axis=1)
    rng = np.random.default_rng(seed)
    groups = min(groups, max(1, len(ids) // 32))
    used = hot if len(hot) <= FIT_TOKENS else hot[np.sort(rng.choice(len(hot), FIT_TOKENS, replace=False))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a group that loses all its tokens is simply not used
        centres, _ = kmeans2(used, groups, iter=12, minit="points", rng=rng, missing="warn")
    labels = np.empty(len(ids), np.int16)
    half = (centres**2).sum(1) / 2
    for start in range(0, len(ids), 8192):
        chunk = hot[start : start + 8192]
        labels[start : start + len(chunk)] = np.argmax(chunk @ centres.T - half, axis=1)
    overall = hot.mean(0)
    weights = np.empty((groups, num_experts))
    for group in range(groups):
        members = hot[labels == group]
        share = (members.sum(0) + SMOOTHING * overall) / (len(members) + SMOOTHING)
        weights[group] = -np.log1p(-np.minimum(share, 0.999))
    return LayerGroups(labels, np.maximum(weights, 1e-6))


def expand(weights: np.ndarray, num_experts: int, spread: float, seed: int) -> np.ndarray:
    """float64 [groups, num_experts]: weights of a model with another number of experts, from recorded parents."""
    groups, recorded = weights.shape
    rng = np.random.default_rng(seed)
    if num_experts == recorded:
        return weights
    whole, rest = divmod(num_experts, recorded)
    parents = np.concatenate([np.tile(np.arange(recorded), whole), rng.choice(recorded, rest, replace=False)])
    children = np.bincount(parents, minlength=recorded)
    parents = rng.permutation(parents)
    noise = rng.normal(0.0, spread, num_experts)[None, :] + rng.normal(0.0, spread, (groups, num_experts))
    return np.asarray(weights[:, parents] / children[parents] * np.exp(noise - spread**2))


@kernel
def _draw(labels, weights, cumulative, k, num_groups, groups_per_token, seed, out):  # type: ignore[no-untyped-def]
    """Experts int16 [T, k] of tokens with the given latent groups; see the module's text."""
    experts = weights.shape[1]
    state = np.uint64(seed) * np.uint64(2862933555777941757) + np.uint64(3037000493)
    score = np.empty(experts, np.float64)
    best = np.empty(num_groups, np.float64)
    allowed = np.empty(num_groups, np.uint8)
    per_group = experts // num_groups
    for t in range(labels.shape[0]):
        g = labels[t]
        if groups_per_token >= num_groups:
            total = cumulative[g, experts - 1]
            found = 0
            tries = 0
            while found < k:
                tries += 1
                if tries > MOST_REDRAWS:
                    # One expert has nearly all the weight: draw among the others alone.
                    rest = 0.0
                    for e in range(experts):
                        rest += weights[g, e]
                    for j in range(found):
                        rest -= weights[g, out[t, j]]
                    state ^= state << np.uint64(13)
                    state ^= state >> np.uint64(7)
                    state ^= state << np.uint64(17)
                    left = np.float64(state >> np.uint64(11)) / 9007199254740992.0 * rest
                    picked = -1
                    for e in range(experts):
                        taken = False
                        for j in range(found):
                            taken = taken or out[t, j] == e
                        if not taken:
                            picked = e
                            left -= weights[g, e]
                            if left < 0:
                                break
                    out[t, found] = picked
                    found += 1
                    continue
                state ^= state << np.uint64(13)
                state ^= state >> np.uint64(7)
                state ^= state << np.uint64(17)
                u = np.float64(state >> np.uint64(11)) / 9007199254740992.0 * total
                e = np.searchsorted(cumulative[g], u)
                if e >= experts:
                    continue
                fresh = True
                for j in range(found):
                    if out[t, j] == e:
                        fresh = False
                        break
                if fresh:
                    out[t, found] = e
                    found += 1
            continue
        for e in range(experts):
            state ^= state << np.uint64(13)
            state ^= state >> np.uint64(7)
            state ^= state << np.uint64(17)
            u = (np.float64(state >> np.uint64(11)) + 0.5) / 9007199254740992.0
            score[e] = np.log(weights[g, e]) - np.log(-np.log(u))
        for i in range(num_groups):
            first = -1e300
            second = -1e300
            for e in range(i * per_group, (i + 1) * per_group):
                if score[e] > first:
                    second = first
                    first = score[e]
                elif score[e] > second:
                    second = score[e]
            best[i] = first + second
            allowed[i] = 0
        for _ in range(groups_per_token):
            top = -1
            for i in range(num_groups):
                if allowed[i] == 0 and (top < 0 or best[i] > best[top]):
                    top = i
            allowed[top] = 1
        for j in range(k):
            top = -1
            for i in range(num_groups):
                if allowed[i]:
                    for e in range(i * per_group, (i + 1) * per_group):
                        if top < 0 or score[e] > score[top]:
                            top = e
            out[t, j] = top
            score[top] = -1e301


def draw_like(fitted: LayerGroups, rows: np.ndarray, top_k: int, seed: int) -> np.ndarray:
    """int16 [rows, k]: new tokens of the recorded model's own size for one layer."""
    out = np.empty((len(rows), top_k), np.int16)
    _draw(
        fitted.labels[rows].astype(np.int64), fitted.weights, np.cumsum(fitted.weights, axis=1), top_k, 1, 1, seed + 1,
        out,
    )  # fmt: skip
    return out


class RoutingModel:
    """Draws top-k sets of ``model`` for recorded tokens. ``layers`` are indices of the model's MoE layers."""

    def __init__(
        self, trace: RoutingTrace, model: Model, layers: np.ndarray, *, groups: int = GROUPS,
        child_spread: float = CHILD_SPREAD, seed: int = 0,
    ) -> None:  # fmt: skip
        if model.experts // model.expert_groups * model.groups_per_token < model.top_k:
            raise InputError(f"{model.name}: top-{model.top_k} does not fit in {model.groups_per_token} expert groups")
        self.model = model
        # Layer l of the model follows the recorded layer at the same relative depth.
        self._recorded = (layers * trace.num_layers // model.moe_layers).astype(int)
        fitted = {
            int(layer): fit_layer(trace.topk_ids[:, layer], trace.num_experts, groups, seed)
            for layer in np.unique(self._recorded)
        }
        self._labels = {layer: entry.labels for layer, entry in fitted.items()}
        self._weights = [
            expand(fitted[recorded].weights, model.experts, child_spread, seed * 1000 + 7 * int(layer))
            for layer, recorded in zip(layers.tolist(), self._recorded.tolist(), strict=True)
        ]
        self._cumulative = [np.cumsum(weights, axis=1) for weights in self._weights]

    def draw(self, rows: np.ndarray, seed: int) -> np.ndarray:
        """int16 [layers, rows, k]: new tokens that behave like the recorded tokens ``rows``."""
        out = np.empty((len(self._weights), len(rows), self.model.top_k), np.int16)
        for number, recorded in enumerate(self._recorded.tolist()):
            _draw(
                self._labels[recorded][rows].astype(np.int64), self._weights[number], self._cumulative[number],
                self.model.top_k, self.model.expert_groups, self.model.groups_per_token,
                seed * 4096 + number + 1, out[number],
            )  # fmt: skip
        return out
