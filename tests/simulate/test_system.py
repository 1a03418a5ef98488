from __future__ import annotations

import pytest

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.simulate.calibration import load_calibration
from sglang_eplb_affinity.simulate.system import divisible_redundancy, load_system, preset_names


def test_every_preset_loads_and_its_calibration_has_all_phases():
    assert len(preset_names()) >= 5
    for name in preset_names():
        system = load_system(name)
        assert system.name == name
        phases = load_calibration(system.cluster.calibration).phases
        assert set(phases) == {f"{m}.{p}" for m in ("normal", "low_latency", "v2") for p in ("dispatch", "combine")}


@pytest.mark.parametrize("gpus", [8, 16, 32, 64, 144, 320])
def test_presets_resize_to_every_size(gpus):
    system = load_system("deepseek-v3-h800").resized(gpus)
    assert system.num_slots % gpus == 0 and system.num_slots >= 288
    assert system.topology.gpus_per_node == 8


def test_divisible_redundancy():
    assert divisible_redundancy(256, 32, 32) == 32
    assert divisible_redundancy(256, 144, 0) == 32
    assert divisible_redundancy(256, 320, 32) == 64


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("top_k: 4", "top_k: 40", "top_k is 40"),
        ("hidden: 4096", "hidden: wide", "model.hidden: 'wide'"),
        ("  hidden: 4096\n", "", "model.hidden: missing"),
        ("gpus: 8", "gpus: 6", "cluster.gpus is 6"),
        ("prefill_mode: normal", "prefill_mode: fast", "'fast' is not one of normal, low_latency, v2"),
        ("dispatch_dtype: fp8", "dispatch_dtype: fp8\n  depth: 3", "model.depth: unknown"),
        ("redundant_experts: 0", "redundant_experts: 3", "19 physical experts"),
        ("hbm_gb_per_s: 3350", "hbm_gb_per_s: -1", "hbm_gb_per_s is -1"),
    ],
)
def test_bad_topology_names_the_field(system_file, old, new, part):
    text = system_file.read_text()
    assert old in text
    system_file.write_text(text.replace(old, new))
    with pytest.raises(InputError) as error:
        load_system(str(system_file))
    assert part in str(error.value) and "\n" not in str(error.value)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(InputError, match="deepseek-v3-h800"):
        load_system("deepseek-v9")
