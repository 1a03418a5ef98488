"""Where the simulated tokens come from: a recording of the model itself, or a routing model fitted to another's."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.reading import name_of
from sglang_eplb_affinity.domain.routing import RoutingTrace, RoutingWindow
from sglang_eplb_affinity.simulate.routing_model import CHILD_SPREAD, RoutingModel
from sglang_eplb_affinity.simulate.system import Model

PLAN_COUNT_TOKENS = 32768
PLAN_SAMPLE_TOKENS = 8192
PREFILL_RUN = 128
# Larger batches are drawn thinner and scaled; the busiest GPU then looks a few per cent busier than it would be.
MOST_TOKENS = 1 << 17


def sampled_layers(model: Model, count: int) -> np.ndarray:
    """Indices of ``count`` MoE layers, spread evenly over the depth; 0: all of them."""
    if count < 0:
        raise InputError(f"--layers {count}: must be 0 (all) or more")
    return np.unique(np.linspace(0, model.moe_layers - 1, min(count or model.moe_layers, model.moe_layers)).astype(int))


def load_recording(trace: Path | None, dumps: tuple[Path, ...], dense_layers: int = 0) -> RoutingTrace:
    """A trace file, or recorder dumps with token sets (counts alone cannot say which experts fire together).

    ``dense_layers``: leading dense layers, which dumps have silent rows for and traces leave out; checked.
    """
    if (trace is None) == (not dumps):
        raise InputError("give either --trace or --dump (once or several times)")
    if trace is not None:
        return RoutingTrace.load(trace)
    from sglang_eplb_affinity.formats.dumps import dense_rows, read_dumps

    window = read_dumps(dumps, 1 << 16)
    if window.tokens is None or not window.tokens.size:
        raise InputError(
            f"{name_of(dumps[0])}: holds counts only, but simulating needs token sets (affinity or per_token)"
        )
    dense_rows(window, dense_layers, name_of(dumps[0]))
    layers = np.flatnonzero(window.counts.any(1))
    tokens = window.tokens[layers]
    used = (tokens[:, :, 0] >= 0).all(0)
    if not used.any():
        raise InputError(f"{name_of(dumps[0])}: no token was recorded in all layers")
    return RoutingTrace(
        np.ascontiguousarray(tokens[:, used].transpose(1, 0, 2)), window.num_experts, source=name_of(dumps[0])
    )


class RoutingSource:
    """Plan windows and test batches for ``layers`` (indices of the model's MoE layers).

    The recording is split by sequence (without sequences: first and second half) unless ``test`` is given: what is
    planned on is never simulated on.
    """

    def __init__(
        self, plan: RoutingTrace, test: RoutingTrace | None, model: Model, layers: np.ndarray, *, seed: int = 0,
        child_spread: float = CHILD_SPREAD,
    ) -> None:  # fmt: skip
        if test is None:
            trace, in_plan = plan, split_rows(plan)
        else:
            if test.topk_ids.shape[1:] != plan.topk_ids.shape[1:] or test.num_experts != plan.num_experts:
                raise InputError(
                    f"{test.source}: has {test.num_layers} layers, {test.num_experts} experts, top-{test.top_k}, but "
                    f"{plan.source} has {plan.num_layers}, {plan.num_experts}, top-{plan.top_k}"
                )
            trace = _joined(plan, test)
            in_plan = np.arange(trace.num_tokens) < plan.num_tokens
        self.trace, self.layers, self.seed = trace, layers, seed
        self.plan_rows, self.test_rows = np.flatnonzero(in_plan), np.flatnonzero(~in_plan)
        for rows, half in ((self.plan_rows, "plan"), (self.test_rows, "test")):
            if not len(rows):
                raise InputError(
                    f"{trace.source}: the {half} half is empty, since there are {trace.num_tokens} token(s); record "
                    "at least 2, or give --test-trace"
                )
        self._moe_layers = model.moe_layers
        self.recorded = trace.num_experts == model.experts and trace.top_k == model.top_k
        self._layers_of_trace = layers * trace.num_layers // model.moe_layers
        self._model = (
            None if self.recorded else RoutingModel(trace, model, layers, seed=seed, child_spread=child_spread)
        )
        self._experts = model.experts

    @property
    def label(self) -> str:
        """What a reader must know about the routing."""
        name = Path(self.trace.source).name
        if self.recorded and self.trace.num_layers != self._moe_layers:
            return (
                f"recorded routing of another model or of some layers ({name}: {self.trace.num_layers} layers), "
                f"stretched over {self._moe_layers} MoE layers"
            )
        if self.recorded:
            return f"recorded routing ({name})"
        return f"simulated routing, fitted to {name} ({self.trace.num_experts} experts, top-{self.trace.top_k})"

    def tokens(self, rows: np.ndarray, seed: int) -> np.ndarray:
        """int16 [layers, rows, k] of recorded tokens ``rows``."""
        if self._model is not None:
            return self._model.draw(rows, seed)
        ids = self.trace.topk_ids[rows][:, self._layers_of_trace]
        return np.ascontiguousarray(ids.transpose(1, 0, 2), dtype=np.int16)

    def plan_window(self, rows: np.ndarray | None = None) -> RoutingWindow:
        """The planner's input: counts of many tokens, a uniform sample of token sets."""
        rng = np.random.default_rng(self.seed)
        rows = self.plan_rows if rows is None else rows
        count = PLAN_COUNT_TOKENS if self._model is not None else min(PLAN_COUNT_TOKENS, len(rows))
        picked = rng.choice(rows, count, replace=count > len(rows))
        tokens = self.tokens(picked, 1_000_003 + self.seed)
        counts = np.stack([np.bincount(layer.ravel(), minlength=self._experts) for layer in tokens]).astype(np.int64)
        return RoutingWindow(counts, None, np.ascontiguousarray(tokens[:, :PLAN_SAMPLE_TOKENS]))

    def batch(
        self, tokens_per_gpu: int, gpus: int, prefill: bool, seed: int, rows: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """(int16 [layers, T, k], source int32 [T], scale): one step's tokens, and how often each stands for itself.

        Decode takes one token of a random sequence for each request; prefill runs of consecutive tokens.
        """
        rng = np.random.default_rng([self.seed, seed, tokens_per_gpu, gpus])
        rows = self.test_rows if rows is None else rows
        drawn = min(tokens_per_gpu, max(1, MOST_TOKENS // gpus))
        if prefill:
            runs = -(-drawn // PREFILL_RUN)
            start = rng.integers(0, max(1, len(rows) - PREFILL_RUN), (gpus, runs, 1))
            place = (start + np.arange(PREFILL_RUN)) % len(rows)
            picked = rows[place.reshape(gpus, -1)[:, :drawn].ravel()]
        else:
            picked = rng.choice(rows, drawn * gpus)
        source = np.repeat(np.arange(gpus, dtype=np.int32), drawn)
        return self.tokens(picked, 17 + seed), source, tokens_per_gpu / drawn


def split_rows(trace: RoutingTrace) -> np.ndarray:
    """bool [tokens]: the half to plan on, by sequence where there are sequences."""
    if trace.sequence is None or len(np.unique(trace.sequence)) < 4:
        return np.arange(trace.num_tokens) < trace.num_tokens // 2
    rank = np.unique(trace.sequence, return_inverse=True)[1]
    return np.asarray(rank % 2 == 0)


def _joined(a: RoutingTrace, b: RoutingTrace) -> RoutingTrace:
    both = {}
    for name in ("sequence", "domain"):
        x, y = getattr(a, name), getattr(b, name)
        both[name] = None if x is None or y is None else np.concatenate([x, y])
    same = a.domain_names == b.domain_names
    return RoutingTrace(
        np.concatenate([a.topk_ids, b.topk_ids]), a.num_experts, both["sequence"], both["domain"] if same else None,
        a.domain_names, a.source,
    )  # fmt: skip
