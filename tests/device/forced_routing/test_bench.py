"""The micro-benchmark's own parts."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from bench.micro.forced_routing import least_loaded_ids, main  # noqa: E402


def test_the_loop_that_is_compared_balances_too() -> None:
    torch.manual_seed(0)
    for tokens in (1, 7, 12):
        ids = least_loaded_ids(tokens, 16, 4, "cpu")
        counts = torch.bincount(ids.flatten(), minlength=16)
        assert counts.max() - counts.min() <= 1
        assert all(len(set(row)) == 4 for row in ids.tolist())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "error: bench.micro.forced_routing: needs a CUDA GPU, but PyTorch sees none\n"
    assert not (tmp_path / "x.json").exists()
