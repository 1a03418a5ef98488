"""The flag, replay, and ids written into a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sglang_eplb_affinity.device.forced_routing import (  # noqa: E402
    NOT_THE_MODELS,
    ForcedRouting,
    ForcedRoutingSpec,
    reference_ids,
)
from sglang_eplb_affinity.domain.errors import InputError  # noqa: E402
from sglang_eplb_affinity.domain.routing import RoutingTrace  # noqa: E402
from sglang_eplb_affinity.domain.topology import Topology  # noqa: E402

MODEL: dict[str, Any] = {
    "moe_layers": (3, 4, 5),
    "num_experts": 16,
    "top_k": 4,
    "topology": Topology(4),
    "device": "cpu",
}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    ids = np.argsort(generator.random((10, 3, 16)), axis=2)[:, :, :4].astype(np.int16)
    domain = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0, 0], np.int8)
    path = tmp_path / "trace.npz"
    RoutingTrace(ids, 16, np.arange(10, dtype=np.int32), domain, ("prose", "code", "math")).save(path)
    return path


def one_pass(routing: ForcedRouting, tokens: int, columns: int = 4, real: int | None = None) -> torch.Tensor:
    """[layers, tokens, columns] of one forward pass over ids of -7."""
    out = []
    for layer in MODEL["moe_layers"]:
        ids = torch.full((tokens, columns), -7, dtype=torch.int32)
        routing.apply(layer, ids, None if real is None else torch.tensor([real], dtype=torch.int32))
        out.append(ids)
    return torch.stack(out)


@pytest.mark.parametrize(
    "value, expected",
    [
        ("balanced", ("balanced", "", "", "")),
        ("balanced:spread", ("balanced", "spread", "", "")),
        ("balanced:local", ("balanced", "local", "", "")),
        ("replay:a/b.npz", ("replay", "", "a/b.npz", "")),
        ("replay:a:b.npz,domain=code", ("replay", "", "a:b.npz", "code")),
    ],
)
def test_parse(value: str, expected: tuple[str, ...]) -> None:
    spec = ForcedRoutingSpec.parse(value)
    assert (spec.mode, spec.variant, spec.trace, spec.domain) == expected
    assert spec.value == value and not spec.cycle_layers


@pytest.mark.parametrize(
    "value, expected",
    [("replay:a.npz,layers=cycle", ("a.npz", "")), ("replay:a,b.npz,domain=code,layers=cycle", ("a,b.npz", "code"))],
)
def test_parse_cycled_layers(value: str, expected: tuple[str, str]) -> None:
    spec = ForcedRoutingSpec.parse(value)
    assert (spec.trace, spec.domain) == expected and spec.cycle_layers


@pytest.mark.parametrize(
    "value",
    [
        *("", "even", "balanced:", "balanced:wide", "Balanced", "replay", "replay:", "replay:a,domain="),
        *("replay:,domain=x", "replay:a,domain=,layers=cycle", "replay:,layers=cycle", "replay:a,layers="),
        "replay:a,layers=repeat",
    ],
)
def test_unknown_values_are_refused_in_one_line(value: str) -> None:
    with pytest.raises(InputError) as error:
        ForcedRouting.from_flag(value, **MODEL)
    assert str(error.value).startswith(f"--ep-forced-routing {value}: unknown; use balanced, balanced:spread")
    assert "\n" not in str(error.value)


def test_top_k_above_the_experts_is_refused() -> None:
    with pytest.raises(InputError, match="top-k 17 is larger than the model's 16 experts"):
        ForcedRouting.from_flag("balanced", **{**MODEL, "top_k": 17})


@pytest.mark.parametrize("variant", ["spread", "local"])
def test_fanout_variants_need_experts_in_place(variant: str) -> None:
    with pytest.raises(InputError, match="leave out --enable-eplb"):
        ForcedRouting.from_flag(f"balanced:{variant}", **MODEL, contiguous=False)
    ForcedRouting.from_flag("balanced", **MODEL, contiguous=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"moe_layers": (0, 1)}, "has 3 MoE layers, but the model has 2"),
        ({"num_experts": 32}, "has 16 experts, but the model has 32"),
        ({"top_k": 2}, "has 4 experts a token (top-k), but the model has 2"),
    ],
)
def test_replay_refuses_a_trace_of_another_model(trace: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        ForcedRouting.from_flag(f"replay:{trace}", **{**MODEL, **change})
    assert str(error.value) == f"--ep-forced-routing replay:{trace}: {trace}: {message}"


def test_replay_refuses_missing_files_repeated_experts_and_unknown_domains(trace: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--ep-forced-routing replay:/no/such.npz: /no/such.npz: cannot be read"):
        ForcedRouting.from_flag("replay:/no/such.npz", **MODEL)
    with pytest.raises(InputError, match=r"has no domain 'law' \(has: prose, code, math\)"):
        ForcedRouting.from_flag(f"replay:{trace},domain=law", **MODEL)
    with pytest.raises(InputError, match="domain 'math' has no tokens"):
        ForcedRouting.from_flag(f"replay:{trace},domain=math", **MODEL)
    ids = RoutingTrace.load(trace).topk_ids.copy()
    ids[6, 2] = [5, 9, 1, 9]
    broken = tmp_path / "broken.npz"
    RoutingTrace(ids, 16).save(broken)
    with pytest.raises(InputError, match=r"topk_ids\[6, 2\] has expert 9 twice"):
        ForcedRouting.from_flag(f"replay:{broken}", **MODEL)
    with pytest.raises(InputError, match="has no domain 'code' \\(has: no domains\\)"):
        RoutingTrace(RoutingTrace.load(trace).topk_ids, 16).save(broken)
        ForcedRouting.from_flag(f"replay:{broken},domain=code", **MODEL)


def test_replay_goes_on_row_by_row_and_begins_anew_at_the_end(trace: Path) -> None:
    recorded = RoutingTrace.load(trace).topk_ids.transpose(1, 0, 2)
    routing = ForcedRouting.from_flag(f"replay:{trace}", **MODEL)
    at = 0
    for tokens in (1, 3, 4, 1, 25, 2):
        want = recorded[:, (at + np.arange(tokens)) % 10]
        np.testing.assert_array_equal(one_pass(routing, tokens).numpy(), want)
        at += tokens


def test_replay_of_one_domain_uses_its_rows_only(trace: Path) -> None:
    data = RoutingTrace.load(trace)
    routing = ForcedRouting.from_flag(f"replay:{trace},domain=code", **MODEL)
    np.testing.assert_array_equal(one_pass(routing, 4).numpy(), data.topk_ids[data.domain == 1].transpose(1, 0, 2))


def test_a_trace_is_cycled_over_more_or_fewer_layers_only_when_asked_for(trace: Path) -> None:
    recorded = RoutingTrace.load(trace).topk_ids
    for layers in (2, 3, 7):
        model = {**MODEL, "moe_layers": tuple(range(layers))}
        routing = ForcedRouting.from_flag(f"replay:{trace},layers=cycle", **model)
        for layer in range(layers):
            ids = torch.zeros((4, 4), dtype=torch.int64)
            routing.apply(layer, ids)
            np.testing.assert_array_equal(ids.numpy(), recorded[:4, layer % 3])
    with pytest.raises(InputError, match="has 16 experts, but the model has 32"):
        ForcedRouting.from_flag(f"replay:{trace},layers=cycle", **{**MODEL, "num_experts": 32})


def test_other_layers_and_columns_are_left_alone() -> None:
    routing = ForcedRouting.from_flag("balanced", **MODEL)
    ids = one_pass(routing, 5, columns=6)  # two columns of fused shared experts
    assert (ids[:, :, 4:] == -7).all()
    assert (ids[:, :, :4] >= 0).all()
    for layer in (None, 0, 6):
        untouched = torch.full((2, 4), -7)
        routing.apply(layer, untouched)
        assert (untouched == -7).all()


@pytest.mark.parametrize("variant", ["balanced", "balanced:spread", "balanced:local"])
def test_balance_holds_within_each_pass_and_over_passes(variant: str) -> None:
    routing = ForcedRouting.from_flag(variant, **MODEL)
    total = np.zeros((3, 16), np.int64)
    for tokens in (1, 1, 2, 7, 64, 3, 1, 129):
        ids = one_pass(routing, tokens).numpy()
        for layer in range(3):
            counts = np.bincount(ids[layer].ravel(), minlength=16)
            assert counts.max() - counts.min() <= 1
            total[layer] += counts
            assert total[layer].max() - total[layer].min() <= 1


def test_ranks_with_their_own_tokens_do_not_pile_up_what_is_left_over() -> None:
    total = np.zeros((3, 16), np.int64)
    for rank in range(4):
        routing = ForcedRouting.from_flag("balanced", **MODEL, own_tokens=True, rank=rank)
        for layer, ids in enumerate(one_pass(routing, 5).numpy()):
            total[layer] += np.bincount(ids.ravel(), minlength=16)
    assert (total.max(1) - total.min(1) <= 1).all()


def test_ranks_that_route_the_same_batch_choose_the_same_ids() -> None:
    ranks = [ForcedRouting.from_flag("balanced", **MODEL, own_tokens=False, rank=rank) for rank in range(4)]
    for real in (3, 5, 8):  # what a rank calls real tokens may differ from rank to rank; rows do not
        outs = [one_pass(routing, 8, real=real - (rank % 2)) for rank, routing in enumerate(ranks)]
        assert all(torch.equal(out, outs[0]) for out in outs)


def test_padding_does_not_advance_ranks_with_their_own_tokens(trace: Path) -> None:
    recorded = RoutingTrace.load(trace).topk_ids.transpose(1, 0, 2)
    routing = ForcedRouting.from_flag(f"replay:{trace}", **MODEL, own_tokens=True)
    one_pass(routing, 8, real=5)
    np.testing.assert_array_equal(one_pass(routing, 2, real=2).numpy(), recorded[:, 5:7])


def test_a_rank_with_later_layers_only_also_advances(trace: Path) -> None:
    """Pipeline parallelism: the rank's first MoE layer begins the pass, whichever it is."""
    recorded = RoutingTrace.load(trace).topk_ids
    routing = ForcedRouting.from_flag(f"replay:{trace}", **MODEL)
    for step in range(3):
        for index, layer in ((1, 4), (2, 5)):
            ids = torch.zeros((2, 4), dtype=torch.int64)
            routing.apply(layer, ids)
            np.testing.assert_array_equal(ids.numpy(), recorded[2 * step : 2 * step + 2, index])


def test_empty_batches_are_fine() -> None:
    routing = ForcedRouting.from_flag("balanced", **MODEL)
    before = one_pass(routing, 0)
    assert before.shape == (3, 0, 4)
    fresh = ForcedRouting.from_flag("balanced", **MODEL)
    assert torch.equal(one_pass(routing, 3), one_pass(fresh, 3))


def test_the_server_says_what_outputs_are() -> None:
    routing = ForcedRouting.from_flag("balanced:spread", **MODEL)
    assert routing.describe() == {"ep_forced_routing": "balanced:spread", "ep_forced_routing_note": NOT_THE_MODELS}
    assert "not the model's" in NOT_THE_MODELS


def test_reference_wraps_around_far_counters() -> None:
    rows = torch.arange(6, dtype=torch.int16).reshape(3, 2)
    ids = reference_ids(rows, torch.tensor([3 * 10**12 + 2]), 4)
    assert ids.tolist() == [[4, 5], [0, 1], [2, 3], [4, 5]]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_kernel_equals_reference_and_goes_on_in_a_graph(dtype: torch.dtype) -> None:
    from sglang_eplb_affinity.device.triton.forced_routing_kernel import write_ids

    rows = torch.randint(0, 256, (37, 8), dtype=torch.int16, device="cuda")
    for tokens in (1, 127, 8192):
        for begin in (0, 36, 3 * 10**12 + 5):
            start = torch.tensor([begin], device="cuda")
            ids = torch.full((tokens, 9), -7, dtype=dtype, device="cuda")
            write_ids(rows, start, ids)
            assert torch.equal(ids[:, :8], reference_ids(rows, start, tokens).to(dtype))
            assert (ids[:, 8] == -7).all()
    model = {**MODEL, "device": "cuda"}
    routing, eager = ForcedRouting.from_flag("balanced", **model), ForcedRouting.from_flag("balanced", **MODEL)
    buffers = [torch.zeros((5, 4), dtype=dtype, device="cuda") for _ in range(3)]

    def forward() -> None:
        for layer, buffer in zip(MODEL["moe_layers"], buffers, strict=True):
            routing.apply(layer, buffer)

    forward()  # compiles the kernel
    one_pass(eager, 5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward()
    for _ in range(4):
        graph.replay()
        assert torch.equal(torch.stack(buffers).cpu().int(), one_pass(eager, 5))
