"""``primary`` with further slots in simulations and recommendations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.dispatch.small_passes import most_tokens
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.simulate.recommend import candidate_runs, evaluate_candidates, further_choices
from sglang_eplb_affinity.simulate.scenario import arms_of, simulate

PLAN = Path(__file__).parents[2] / "bench/data/tiny_moe_plan.npz"


def test_further_slots_are_of_small_passes_over_several_nodes(system, source):
    serving = replace(system.serving, redundant_experts=2 * system.cluster.gpus)
    two_nodes = replace(system, serving=serving)
    assert two_nodes.topology.num_nodes == 2
    assert further_choices(two_nodes, "decode") == (0, 1)  # two of a GPU would be all of them
    assert further_choices(two_nodes, "prefill") == further_choices(system, "decode") == (0,)
    one_node = replace(two_nodes, cluster=replace(system.cluster, gpus_per_node=system.cluster.gpus))
    assert further_choices(one_node, "decode") == (0,)
    model, redundant = system.model, serving.redundant_experts
    most = most_tokens(model.experts, redundant, model.top_k, system.cluster.gpus, True)
    small, large = (
        arms_of(["eplb", "affinity"], two_nodes, "decode", ["static", "primary"], n, (0, 1)) for n in (most, most + 1)
    )
    assert [(arm.rule, arm.further_slots) for arm in small[1:]] == [("static", 0), ("primary", 0), ("primary", 1)]
    assert [(arm.rule, arm.further_slots) for arm in large[1:]] == [("static", 0), ("primary", 0)]
    rules = ["primary", "static"]
    none, one, every = simulate(
        two_nodes, source, [("decode", most)], ["affinity"], resamples=2, rules=rules, further_slots=(0, 1)
    )
    assert [r.rule_text for r in (none, one, every)] == ["primary", "primary+1", "static"]
    experts_of_gpu = system.model.experts // system.cluster.gpus
    assert none.active_slots <= experts_of_gpu < one.active_slots <= experts_of_gpu + 1 < every.active_slots
    assert none.node_fanout > one.node_fanout > every.node_fanout
    found = evaluate_candidates(two_nodes, source, "decode", most, 2, redundancies=[serving.redundant_experts])
    assert [c.result.rule_text for c in found] == ["static", "static", "static", "primary", "primary+1"]
    assert candidate_runs(two_nodes, "decode", most, 2, [serving.redundant_experts]) == 5 * 3
    assert found[-1].name.endswith("low_latency, primary+1 dispatch")


PRIMARY = ("--dispatch", "primary", "--further-slots")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "--redundant", 16, "--dispatch", "cover", "--further-slots", 1), "needs --dispatch primary, not cov"),
        (("plan", "--redundant", 16, *PRIMARY, 3), "16 redundant experts on 8 GPUs make 2 slots of a GPU"),
        (("plan", "--redundant", 16, "--algorithm", "deepseek", *PRIMARY, 1), "needs --algorithm affinity"),
        (("evaluate", "--map", PLAN, "--further-slots", 1), "--further-slots 1: needs --dispatch primary"),
        (("plan", "--redundant", "auto", "--memory-gb", 1, "--expert-mb", 17, *PRIMARY, 99), "slots of a GPU besides"),
        (("simulate", "--topology", "deepseek-v3-h200", "--further-slots", 9), "9: 32 redundant experts on"),
    ],
)
def test_what_cannot_be_meant_is_one_line(tmp_path, arguments, said):
    size = () if arguments[0] == "simulate" else ("--gpus", 8, "--nodes", 2)
    out = tmp_path / "out.json"
    found = CliRunner().invoke(cli, [str(a) for a in (*arguments, "--trace", PLAN, *size, "--out", out)])
    assert isinstance(found.exception, InputError) and said in str(found.exception)
    assert not out.exists()


def run_refused(*arguments):
    found = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert isinstance(found.exception, InputError)
    return str(found.exception)


def test_a_plan_is_evaluated_with_the_further_slots_that_it_is_made_for(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)

    size = ("--trace", PLAN, "--gpus", 8, "--nodes", 4)
    copies = {}
    for further in (0, 1):
        out = tmp_path / f"{further}.json"
        planned = run("plan", *size, "--redundant", 32, "--effort", "fast", *PRIMARY, further, "--out", out)
        assert planned.exit_code == 0
        for used in (0, 1):
            shown = run("evaluate", *size, "--map", out, *PRIMARY, used, "--pass-tokens", 8, "--format", "csv")
            head, row = (line.split(",") for line in shown.output.splitlines()[:2])
            values = dict(zip(head, row, strict=True))
            assert (values["dispatch"], int(values["further_slots"])) == ("primary", used)
            copies[further, used] = float(values["expert_node_copies"])
    assert copies[1, 1] < copies[0, 1] < copies[0, 0]
    more = run_refused("evaluate", *size, "--map", out, *PRIMARY, 5)
    assert "--further-slots 5: 32 redundant experts on 8 GPUs make 4 slots of a GPU" in more
