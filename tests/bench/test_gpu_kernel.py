"""The kernel's timing and tuning: sizes, ratios, and which launch shape is called best."""

import pytest

from bench.gpu import kernel_report, kernel_times, kernel_tuning
from bench.publish.summary import parse_figures
from sglang_eplb_affinity.device.launch_shape import LaunchShape, default_shapes
from sglang_eplb_affinity.dispatch.rules import KERNEL_RULES
from sglang_eplb_affinity.domain.errors import InputError


def test_kernel_ratios_take_the_worst_size() -> None:
    def cell(tokens: int, ours: float, other: float) -> dict:
        times = {"ours_dynamic": ours, "ours_static": 1.0, "ours_cover": 3.0, "ours_cover_balanced": 3.0, "empty": 1.0}
        times |= {"upstream_dynamic": other, "upstream_static": 4.0}
        return {
            "tokens": tokens,
            "us": {name: {mode: {"median": t} for mode in ("graph", "eager")} for name, t in times.items()},
        }

    found = kernel_report.ratios([cell(128, 1.2, 4.0), cell(8192, 5.0, 8.0)])
    assert found["to_upstream"]["ours_dynamic / upstream_dynamic"] == {"graph": 0.625, "eager": 0.625}
    assert found["to_upstream"]["ours_cover / upstream_dynamic"]["graph"] == 0.75
    assert found["to_empty_up_to_128_tokens"]["ours_dynamic"]["graph"] == 1.2


def test_ratios_of_large_sizes_alone_say_nothing_about_small_ones() -> None:
    times = dict.fromkeys(("ours_dynamic", "ours_static", "ours_cover", "ours_cover_balanced", "empty"), 2.0)
    times |= {"upstream_dynamic": 4.0, "upstream_static": 8.0}
    us = {name: {mode: {"median": t} for mode in ("graph", "eager")} for name, t in times.items()}
    found = kernel_report.ratios([{"tokens": 8192, "us": us}])
    assert found["to_upstream"]["ours_static / upstream_static"]["graph"] == 0.25
    assert found["to_empty_up_to_128_tokens"]["ours_cover"]["graph"] is None


def test_headline_figures_are_the_largest_ratios() -> None:
    times = {"ours_dynamic": 1.0, "ours_static": 1.0, "ours_cover": 3.0, "ours_cover_balanced": 3.0, "empty": 1.0}
    times |= {"upstream_dynamic": 10.0, "upstream_static": 5.0, "upstream_lp": 100.0}
    us = {name: {mode: {"median": t} for mode in ("graph", "eager")} for name, t in times.items()}
    source = {"hardware": "1 x GPU", "versions": {"torch": "2"}, "commit": "abcdef1"}
    cells = [{"tokens": 16, "us": us}]
    result = {"provenance": source, "date": "2026-01-01", "ratios": kernel_report.ratios(cells), "cells": cells}
    found = {figure.name: figure for figure in parse_figures(kernel_report.entries(result), "test")}
    assert found["kernel.time_ratio_to_upstream.max"].value == 0.3
    assert "ours_cover" in found["kernel.time_ratio_to_upstream.max"].unit
    assert found["kernel.static.eager_time_ratio_to_upstream.max"].value == 0.2
    assert found["kernel.cover_balanced.time_ratio_to_upstream.max"].value == 0.3
    assert found["kernel.cover_balanced.time_ratio_to_lp.max"].value == 0.03
    assert found["kernel.cover.time_ratio_to_empty.max"].value == 3.0
    large = {**result, "ratios": kernel_report.ratios([{"tokens": 8192, "us": us}])}
    assert not any("empty" in entry["name"] for entry in kernel_report.entries(large))


def test_sizes_are_all_or_those_asked_for() -> None:
    assert len(kernel_times.sizes()) == 30
    assert kernel_times.sizes(["128/256/8", "1/64/4"]) == [(128, 256, 8), (1, 64, 4)]


@pytest.mark.parametrize("text", ["128", "128/256", "128/256/0", "a/256/8", "128/100/8", "1/64/65", "-1/64/4"])
def test_a_size_that_cannot_be_is_named(text, tmp_path, capsys) -> None:
    assert kernel_times.main(["--out", str(tmp_path / "out.json"), f"--only={text}"]) == 2
    assert f"--only {text}" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("rule", KERNEL_RULES)
def test_every_shape_to_try_can_be_launched_and_has_its_own_label(rule) -> None:
    shapes = kernel_tuning.shapes_to_try(rule)
    for shape in shapes:
        shape.check(rule)
    assert len({kernel_tuning.label(shape) for shape in shapes}) == len(shapes)
    defaults = default_shapes(rule)
    assert {defaults.few, defaults.many} <= set(shapes)


def test_the_default_stays_unless_another_shape_is_clearly_faster() -> None:
    default, other, third = LaunchShape(128, 4), LaunchShape(32, 1), LaunchShape(64, 2)
    assert kernel_tuning.best_shape({default: 1.0, other: 0.99, third: 1.2}, default) == default
    assert kernel_tuning.best_shape({default: 1.0, other: 0.9, third: 0.9}, default) == other
    assert kernel_tuning.best_shape({other: 2.0, third: 1.0}, default) == third


def test_tuning_says_that_it_needs_a_gpu(capsys, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert kernel_tuning.main([]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err


REFUSED = [
    (LaunchShape(100, 4), "static"),
    (LaunchShape(64, 4), "cover"),
    (LaunchShape(64, 2, lanes=True), "cover"),
    (LaunchShape(32, 1, lanes=True), "dynamic"),
]


def test_more_columns_than_lanes_are_not_spread_over_lanes() -> None:
    shapes = default_shapes("cover")
    assert shapes.of(1, 8).lanes and shapes.of(1, 32).lanes and not shapes.of(1, 33).lanes


@pytest.mark.parametrize("shape, rule", REFUSED)
def test_a_shape_the_kernel_cannot_run_with_is_refused(shape, rule) -> None:
    with pytest.raises(InputError, match=f"launch shape: .*{shape.block}"):
        shape.check(rule)
