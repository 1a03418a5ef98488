"""What the time model says of served runs, and how it is set beside measured rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench.calibration.predict import Errors, beside, main, predict, read_prediction, write_prediction
from bench.calibration.served import ServedModel, model_of, one_domain
from bench.harness.engine import ROOT, prepare_engine
from bench.harness.links import with_link
from bench.harness.profile import Profile
from bench.harness.schedule import CellKey
from bench.harness.static_maps import write_maps
from bench.publish.table import tidy
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.topology import Topology
from sglang_eplb_affinity.simulate.traffic import batch_traffic
from tests.bench.conftest import make_record

ARMS = ("vanilla", "cover-balanced-32")
MAPS = ROOT / "results" / "h200-x2-auto-emulated25" / "maps"
AUTO = Profile.named("h200-x2-auto")


def small(profile: Profile) -> Profile:
    """Passes of fewer tokens."""
    flags = list(profile.server.flags)
    flags[flags.index("--chunked-prefill-size") + 1] = "2048"
    load = replace(profile.load, requests={64: 160})
    return replace(profile, server=replace(profile.server, flags=tuple(flags)), load=load)


def test_an_emulated_link_adds_what_its_bytes_take_and_replicas_save_it() -> None:
    alone = predict(small(AUTO), ARMS, ("prefill",), MAPS).set_index("arm")
    slow = predict(small(with_link(AUTO, "emulated25")), ARMS, ("prefill",), MAPS).set_index("arm")
    assert (alone["link_us"] == 0).all() and (slow["tokens_per_gpu"] == 1024).all()
    # Nearly every token goes to the other GPU: hidden values, ids and weights there, hidden values and weights back.
    assert slow.loc["vanilla", "link_us"] == pytest.approx(1024 * (2 * 8192 + 96 + 32) / 25e3, rel=0.02)
    waited = slow["predicted"] - alone["predicted"]
    assert waited["vanilla"] == pytest.approx(24 * slow.loc["vanilla", "link_us"] / 1e3, rel=0.02)
    assert waited["cover-balanced-32"] < 0.8 * waited["vanilla"]
    assert slow.loc["vanilla", "ratio_to_vanilla"] == 1 > slow.loc["cover-balanced-32", "ratio_to_vanilla"]


def test_over_a_slow_link_decode_is_shorter_with_replicas_on_the_own_node(tmp_path: Path) -> None:
    """And within a node with one active slot an expert, which `by-phase` has in no pass."""
    steps = {}
    for profile in (AUTO, with_link(AUTO, "emulated25")):
        folder, arms = tmp_path / (profile.link or "nvlink"), ("vanilla", "primary-32", "by-phase-32")
        write_maps(profile.server, arms, prepare_engine(profile.server).model, folder)
        found = predict(profile, arms, ("decode",), folder)
        steps[profile.link] = found[found["concurrency"] == 256].set_index("arm")["ratio_to_vanilla"]
    assert steps["emulated25"]["by-phase-32"] < 0.9 < 1 < steps["emulated25"]["primary-32"]
    assert steps[""]["primary-32"] < 1 < steps[""]["by-phase-32"]


def test_requests_take_their_own_decode_steps_and_everyones_prefills() -> None:
    profile = small(AUTO)
    served = ServedModel(profile, prepare_engine(profile.server).model, {})
    (_, batch, step, _), *_ = served.of_load(replace(profile.loads["decode"], output_tokens=64), 64, "none")
    (tpot, _, tpot_ms, _), (qps, _, a_second, _) = served.of_load(profile.load, 64, "none")
    assert (tpot, qps, batch) == ("p50_tpot_ms", "qps", 32) and tpot_ms > step
    assert a_second == pytest.approx(1e3 * 64 / (64 * tpot_ms))


def test_emulated_nodes_share_one_nvlink() -> None:
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(16, dtype=np.int16), (512, 1)), axis=1)[:, :4]
    source = np.repeat(np.arange(4, dtype=np.int32), 128)
    served = ExpertMap.contiguous(1, 16, 16)
    two, one = (batch_traffic(ids, source, served, 0, Topology(4, nodes), "static") for nodes in (2, 1))
    joined = one_domain(two, 4)
    assert joined.counters[0].tolist() == one.counters[0].tolist()
    for row in range(12):
        assert joined.counters[row].sum() == pytest.approx(one.counters[row].sum(), abs=4) or row == 9


def test_errors_are_of_times_and_of_gains(tmp_path: Path) -> None:
    predicted = predict(small(AUTO), ARMS, ("prefill",), MAPS)
    write_prediction(predicted, tmp_path / "p.csv", "command")
    assert (tmp_path / "p.csv").read_text().startswith("# Simulated: command, ")
    kept = read_prediction(tmp_path / "p.csv")
    ms = kept.set_index("arm")["predicted"]
    records = []
    for block in (0, 1):
        for arm, factor in (("vanilla", 1.25), ("cover-balanced-32", 1.0)):
            record = make_record(CellKey(block, arm, 384, "prefill"))
            records.append(replace(record, metrics={"full_prefill_ms": factor * ms[arm]}))
    table = beside(kept, tidy(records)).set_index("arm")
    assert table["error_pct"].tolist() == [-20.0, 0.0]
    ratio = kept.set_index("arm").loc["cover-balanced-32", "ratio_to_vanilla"]
    assert table.loc["cover-balanced-32", "gain_error_points"] == pytest.approx(-100 * ratio * 0.2, abs=0.1)
    assert Errors.of(table).steps == (20.0, 10.0)


def test_what_cannot_be_predicted_is_one_line(tmp_path: Path) -> None:
    for arguments, said in (
        ([], "--profile: name one to predict"),
        (["--profile", "h200-x2"], "only profiles with a plan_trace"),
        (["--beside", str(tmp_path)], "not the folder of a benchmark run"),
        (["--beside", str(MAPS.parent), "--prediction", str(tmp_path / "no.csv")], "not a prediction"),
    ):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2 and done.output.startswith("error: ") and said in done.output, done.output
    with pytest.raises(InputError, match="knows models of random:KEY"):
        model_of(str(tmp_path), "some/model")


def test_predictions_of_4_gpus_are_kept_for_their_runs() -> None:
    for link in ("nvlink", "emulated25"):
        kept = read_prediction(ROOT / "results" / "simulate" / f"predicted-h200-x4-auto-{link}.csv")
        assert set(kept["arm"]) == set(Profile.named("h200-x4-auto").arms)
        assert {64, 256, 2048} <= set(kept[kept["load"] == ""]["concurrency"])
