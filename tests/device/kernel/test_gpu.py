"""The compiled kernel: equal to the torch reference, and a captured graph sees new maps, passes and schedules."""

import numpy as np
import pytest
import torch

from sglang_eplb_affinity.device.map_and_record import LayerTables, MapAndRecord, Placement
from sglang_eplb_affinity.device.recorder import AffinityRecorder, RecorderConfig, RowLayout
from sglang_eplb_affinity.domain.topology import Topology
from tests.device.kernel.cases import CASES, RULES
from tests.device.kernel.random_case import Case, path, random_ids, random_map, run, tables_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_equals_the_reference(case: Case) -> None:
    run(case, "cuda")


@pytest.mark.parametrize("hot", [3, 60])
@pytest.mark.parametrize("rule", RULES[1:])
def test_many_tokens_on_many_gpus(rule, hot) -> None:
    sizes = {"experts": 256, "redundant": 32, "hot": hot, "k": 8, "groups": ((8000, 192),), "layers": 3}
    case = Case(rule, gpus=32, nodes=4, source=5, **sizes)
    run(case, "cuda", passes=4)


@pytest.mark.parametrize("rule", RULES[1:])
def test_one_compiled_kernel_serves_passes_of_any_size_and_alignment(rule) -> None:
    case = Case(
        rule, experts=63, redundant=17, hot=20, k=8, gpus=8, nodes=2, layers=2
    )  # layers' counts differ in alignment
    random = np.random.default_rng(3)
    expert_map = random_map(random, case)
    tables = tables_of(case, expert_map, "cuda")
    ours, reference = path(case, "cuda", expert_map), path(case, "cuda", expert_map)
    for number in (1, 16, 17, 1, 50):
        rows = RowLayout((number,))
        for side in (ours, reference):
            side.recorder.begin_pass([number])
        for layer in range(2):
            buffer = torch.full((number + 1, 11), -7, dtype=torch.int32, device="cuda")
            given = buffer.view(-1)[layer : layer + number * 11].view(number, 11)  # begins and steps at odd addresses
            given[:, :8] = random_ids(random, number, case)
            expected = given.clone()
            ours(layer, given, rows, tables[layer])
            reference.reference(layer, expected, rows, tables[layer])
            assert torch.equal(given, expected), (number, layer)
    for a, b in zip(_state(ours.recorder), _state(reference.recorder), strict=True):
        assert torch.equal(a, b)


def _state(recorder: AffinityRecorder) -> tuple[torch.Tensor, torch.Tensor]:
    return recorder.counts.clone(), recorder.sample().clone()


@pytest.mark.parametrize("rule", RULES)
def test_graph_replays_see_new_maps_and_passes(rule) -> None:
    case = Case(rule, experts=64, redundant=16, k=8, gpus=8, nodes=2, layers=2)
    random = np.random.default_rng(1)
    rows = RowLayout((16,))
    tables = tables_of(case, random_map(random, case), "cuda")
    config = RecorderConfig(sample_tokens=40)
    sizes = {"num_layers": 2, "num_experts": 64, "top_k": 8, "device": "cuda", "config": config}
    placement = Placement(Topology(8, 2), 80, 17, 1)
    graphed, eager = (MapAndRecord(8, AffinityRecorder(**sizes), placement) for _ in range(2))
    given = torch.zeros(16, 8, dtype=torch.int32, device="cuda")
    valid = torch.zeros((), dtype=torch.int32, device="cuda")
    out = [torch.zeros_like(given) for _ in range(2)]

    def layers() -> None:
        for layer in range(2):
            out[layer].copy_(given)
            graphed(layer, out[layer], rows, tables[layer], valid)

    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    for number, tokens in enumerate((16, 3, 0, 9, 16, 7)):
        if number == 3:  # a rebalance: SGLang updates its tensors in place
            for old, new in zip(tables, tables_of(case, random_map(random, case), "cuda"), strict=True):
                if old is not None and new is not None:
                    old.slots.copy_(new.slots)
                    if old.counts is not None:
                        old.counts.copy_(new.counts)
        given.copy_(random_ids(random, 16, case))
        valid.fill_(tokens)
        for side in (graphed, eager):
            side.recorder.begin_pass([tokens], phase=number % 2, record=number != 4)
        graph.replay()
        for layer in range(2):
            expected = given.clone()
            eager.reference(layer, expected, rows, tables[layer], valid)
            assert torch.equal(out[layer], expected), (number, layer)
        for side in (graphed, eager):
            side.recorder.end_pass()
        for a, b in zip(_state(graphed.recorder), _state(eager.recorder), strict=True):
            assert torch.equal(a, b)
    before = _state(graphed.recorder)
    graph.replay()  # outside a pass: counts nothing
    assert all(torch.equal(a, b) for a, b in zip(before, _state(graphed.recorder), strict=True))
    assert before[0].sum() == 2 * 8 * (16 + 3 + 9 + 7) - _masked(before)


def test_a_pass_in_two_launches_leaves_its_workspace_empty() -> None:
    case = Case("cover_balanced", experts=64, redundant=32, hot=20, k=8, gpus=8, nodes=2, layers=1, record=False)
    random = np.random.default_rng(2)
    expert_map = random_map(random, case)
    (tables,) = tables_of(case, expert_map, "cuda")
    step, rows = path(case, "cuda", expert_map), RowLayout((700,))
    given = torch.zeros(700, 8, dtype=torch.int32, device="cuda")
    out = torch.zeros_like(given)

    def twice() -> None:  # two layers after each other, as in a model
        for _ in range(2):
            out.copy_(given)
            step(0, out, rows, tables)

    twice()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice()
    for _ in range(3):
        given.copy_(random_ids(random, 700, case))
        graph.replay()
        expected = given.clone()
        step.reference(0, expected, rows, tables)
        assert torch.equal(out, expected)


def _masked(before: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Assignments missing because random ids hold rows of -1; both sides agree on them, so take the sample's word."""
    sample = before[1]
    taken = sample[:, : 16 + 3 + 9 + 7]
    return int((taken < 0).sum())


def test_two_runs_leave_the_same() -> None:
    results = []
    for _ in range(2):
        case = Case("cover", gpus=8, nodes=2, experts=128, redundant=32, k=8, groups=((4096, 0),), layers=1)
        random = np.random.default_rng(5)
        expert_map = random_map(random, case)
        (tables,) = tables_of(case, expert_map, "cuda")
        recorder = AffinityRecorder(num_layers=1, num_experts=128, top_k=8, device="cuda")
        step = MapAndRecord(8, recorder, Placement(Topology(8, 2), 160, 33, 0))
        ids = random_ids(random, 4096, case).cuda()
        recorder.begin_pass([4096])
        assert isinstance(tables, LayerTables)
        step(0, ids, RowLayout((4096,)), tables)
        results.append((ids, *_state(recorder)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
