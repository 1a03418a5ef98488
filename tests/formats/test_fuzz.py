"""Nothing ends in a traceback: every reader on broken files gives a result or an InputError of one line."""

from __future__ import annotations

import base64
import gzip
import io
import json
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_eplb_affinity.domain import reading
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.routing import RoutingTrace
from sglang_eplb_affinity.formats.dumps import read_dumps
from sglang_eplb_affinity.formats.maps import load_map
from sglang_eplb_affinity.formats.responses import read_responses
from tests.formats.files import EXPERTS, KINDS, K, broken, with_odd_value, write_all

torch = pytest.importorskip("torch", reason="SGLang's dumps are torch files")

READERS: tuple[Callable[[Path], object], ...] = (
    RoutingTrace.load,
    load_map,
    lambda path: read_dumps([path], note=lambda _: None),
    lambda path: read_responses(path, EXPERTS, K),
)
PACKED = ("trace.npz.gz", "map.json.gz", "trt.yaml.gz", "ours.pt.gz", "vllm.jsonl.gz")
FLIPS_PER_FILE = 85


def read_by_all(path: Path) -> int:
    """How many readers took the file; anything but a result or one line that names it fails."""
    taken = 0
    for read in READERS:
        try:
            read(path)
            taken += 1
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
    return taken


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    files = write_all(tmp_path_factory.mktemp("valid"))
    return {name: data for name, data in files.items() if name in KINDS or name in PACKED}


def test_valid_files_are_read(valid: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in valid.items():
        (tmp_path / name).write_bytes(data)
        assert read_by_all(tmp_path / name) == 1, name


def test_flipped_cut_and_joined_bytes_are_a_result_or_one_line(valid: dict[str, bytes], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    most_memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    inputs = 0
    for name, data in valid.items():
        path = tmp_path / name
        for _ in range(FLIPS_PER_FILE):
            path.write_bytes(broken(data, rng))
            read_by_all(path)
            inputs += 1
    assert inputs >= 1500
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most_memory
    assert grown < 1 << 20, f"{grown >> 10} MiB more"  # ru_maxrss is in KiB
    assert time.monotonic() - start < 240


def test_odd_values_in_valid_files(valid: dict[str, bytes], tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    refused = 0
    for name in ("map.json", "ascend.json", "trt.yaml", "steps.json", "counts.json", "sglang.jsonl", "vllm.jsonl"):
        lines = [json.loads(line) for line in valid[name].decode().split("\n") if line] if "jsonl" in name else None
        content = lines or yaml.safe_load(valid[name])
        for _ in range(40):
            odd = with_odd_value(content, rng)
            text = "".join(f"{json.dumps(line)}\n" for line in odd) if lines else (
                yaml.safe_dump(odd) if name.endswith("yaml") else json.dumps(odd))  # fmt: skip
            (tmp_path / name).write_text(text)
            refused += not read_by_all(tmp_path / name)
    assert refused > 100


# numbers as texts, floats, NaN, negative, too large; empty lists; rows of different lengths
NUMBERS = st.one_of(st.integers(-3, 20), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
LISTS = st.recursive(NUMBERS, lambda inner: st.lists(inner, max_size=4), max_leaves=12)
DEVICES = st.lists(st.fixed_dictionaries({"device_id": NUMBERS, "device_expert": LISTS}) | LISTS, max_size=3)
CONTENTS = st.one_of(
    LISTS,
    st.dictionaries(
        st.sampled_from(["logical_count", "physical_to_logical_map", "affinity", "records", "moe_layer_count",
                         "last_physical_to_logical_map", "initial_global_assignments", "num_slots"]),
        LISTS | st.dictionaries(st.text(max_size=3) | st.sampled_from(["version", "counts", "tokens"]), LISTS),
    ),
    st.fixed_dictionaries({"layer_list": st.lists(
        st.fixed_dictionaries({"layer_id": NUMBERS, "device_list": DEVICES | LISTS}) | LISTS, max_size=3)}),
)  # fmt: skip


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(content=CONTENTS, suffix=st.sampled_from([".json", ".yaml"]))
def test_any_structure_is_a_result_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: Any, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_text(json.dumps(content))
    read_by_all(path)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(
    ids=st.lists(st.integers(-(1 << 40), 1 << 40) | st.integers(-1, 4), min_size=1, max_size=12),
    experts=st.integers(-(1 << 40), 1 << 40) | st.integers(0, 8),
    dtype=st.sampled_from(["i8", "i2", "u8", "f4", "U3", "?", "c8"]), extra=NUMBERS,
)  # fmt: skip
def test_any_arrays_in_a_trace_are_a_result_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], experts: int, dtype: str, extra: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.npz"
    values = np.array(ids).astype(dtype).reshape(-1, 1, 1)
    extras = {} if extra is None else {"domain": np.array([extra] * len(ids), dtype=str(np.asarray(extra).dtype))}
    try:
        np.savez(path, topk_ids=values, num_experts=experts, **extras)
    except (ValueError, OverflowError):  # numpy does not write it: nobody can have such a file
        return
    read_by_all(path)


def test_files_that_ask_for_tables_larger_than_they_are(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.savez(tmp_path / "wide.npz", topk_ids=np.zeros((1, 1000, 1), np.int16), num_experts=4096)
    with pytest.raises(InputError, match="1000 layers of 4096 experts; their co-activation is too large"):
        RoutingTrace.load(tmp_path / "wide.npz")
    detail = {"records": [{"topk_ids_of_layer": torch.zeros(1000, 1, 8, dtype=torch.int32)}],
              "last_physical_to_logical_map": torch.full((1000, 1), 4095)}  # fmt: skip
    torch.save(detail, tmp_path / "wide.pt")
    with pytest.raises(InputError, match="names expert 4095, but 1 slots"):
        read_dumps([tmp_path / "wide.pt"])
    ids = torch.zeros(1, 100_000, dtype=torch.int16)
    ids[0, :4096] = torch.arange(4096)
    torch.save({"physical_to_logical_map": ids}, tmp_path / "wide_map.pt")
    with pytest.raises(InputError, match="replicas of an expert in a layer, too many"):
        load_map(tmp_path / "wide_map.pt")
    coded = io.BytesIO()
    np.lib.format.write_array_header_1_0(  # type: ignore[no-untyped-call]
        coded, {"descr": "|u1", "fortran_order": False, "shape": (10**12, 48, 8)}
    )
    response = {"choices": [{"routed_experts": base64.b64encode(coded.getvalue()).decode()}]}
    (tmp_path / "claims.jsonl").write_text(json.dumps(response))
    with pytest.raises(InputError, match=r"line 1: routed_experts claims shape \(1000000000000, 48, 8\)"):
        read_responses(tmp_path / "claims.jsonl", 16)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # KiB


def test_a_header_that_claims_more_than_the_file_holds_is_refused_before_allocation(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(  # type: ignore[no-untyped-call]
        header, {"descr": "<i2", "fortran_order": False, "shape": (10**12, 48, 8)}
    )
    path = tmp_path / "claims.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("topk_ids.npy", header.getvalue() + b"\0" * 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"topk_ids claims shape \(1000000000000, 48, 8\)"):
        RoutingTrace.load(path)
    torch.save({"logical_count": torch.zeros(1).expand(10**6, 60, 256)}, tmp_path / "claims.pt")
    with pytest.raises(InputError, match="claims 15360000000 elements, but the file holds 1"):
        read_dumps([tmp_path / "claims.pt"])
    (tmp_path / "map.json").write_text('{"physical_to_logical_map": [[0, 2000000000]]}')
    with pytest.raises(InputError, match="layer 0 has no replica of logical expert 1"):
        load_map(tmp_path / "map.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17  # KiB


def test_yaml_aliases_and_zeros_packed_a_thousand_to_one_do_not_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bomb.yaml").write_text("a: &a [0, 0]\ninitial_global_assignments: {0: [*a, *a], 1: [*a, *a]}\n")
    with pytest.raises(InputError, match="aliases"):
        load_map(tmp_path / "bomb.yaml")
    monkeypatch.setattr(reading, "MAX_TEXT", 1 << 20)
    (tmp_path / "zeros.json.gz").write_bytes(gzip.compress(bytes(1 << 24)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in READERS:
        with pytest.raises(InputError, match="MiB"):
            read(tmp_path / "zeros.json.gz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 13  # KiB
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="not JSON"):
        load_map(tmp_path / "deep.json")
