"""Times of experts by active slots: the cases, and the figure that is made of them. The products need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.gpu.precompile_experts import products
from bench.micro.expert_slots import SHAPES, TOP_K, Case, cases, entries, main, rows_of_slots
from bench.publish.summary import parse_figures

SOURCE = {"hardware": "1 x GPU", "versions": {"torch": "2"}, "commit": "abcdef0"}


def test_every_input_goes_to_a_slot_that_is_active() -> None:
    for case in cases():
        present = max(next(shape for shape in SHAPES if shape.name == case.shape).slots)
        rows = rows_of_slots(case, present)
        assert rows.sum() == case.tokens * TOP_K and not rows[case.slots :].any()
        assert rows[: case.slots].max() - rows[: case.slots].min() <= 1
    assert rows_of_slots(Case("x", "bf16", 32, 8), 36)[:32].all()  # 64 inputs, so each active slot has one


def test_the_figure_is_the_median_over_numbers_of_tokens() -> None:
    rows = [
        {"shape": "deepseek-v3", "dtype": dtype, "slots": slots, "tokens": tokens, "us": us}
        for dtype, slots, tokens, us in [
            ("bf16", 32, 8, 100.0), ("bf16", 36, 8, 110.0), ("bf16", 32, 32, 100.0), ("bf16", 36, 32, 112.0),
            ("bf16", 32, 128, 100.0), ("bf16", 36, 128, 120.0), ("fp8", 32, 8, 1.0), ("fp8", 36, 8, 9.0),
        ]
    ]  # fmt: skip
    (figure,) = parse_figures(entries(rows, SOURCE, "2026-01-01T00:00:00Z", "x"), "entries")
    assert (figure.value, figure.lower, figure.upper) == (1.12, 1.1, 1.2)
    assert entries(rows[:1], SOURCE, "2026-01-01T00:00:00Z", "x") == []


def test_products_cover_both_of_a_layer_and_every_batch() -> None:
    found = products([32, 36], 4096, 640, [8, 256], ranks=2)
    assert {(p.outer, p.inner) for p in found} == {(1280, 4096), (4096, 640)}
    assert {p.expected for p in found if p.slots == 32} == {0, 3, 65}  # as SGLang's dispatcher rounds
    assert len(set(found)) == len(found)


def test_cases_of_one_shape_and_type_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {(case.shape, case.dtype) for case in cases("qwen3-235b:fp8")} == {("qwen3-235b", "fp8")}
    with pytest.raises(SystemExit) as ended:
        main(["--only", "qwen3:fp8", "--out", str(tmp_path / "x.json")])
    assert ended.value.code == 2 and "--only: invalid choice: 'qwen3:fp8'" in capsys.readouterr().err


def test_it_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["--out", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "error: bench.micro.expert_slots: needs a CUDA GPU, but PyTorch sees none\n"
    assert not (tmp_path / "x.json").exists()
