"""Recorder dumps of the three kinds become the same window."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.expert_map import ExpertMap
from sglang_eplb_affinity.domain.routing import RoutingTrace, coactivation_of
from sglang_eplb_affinity.formats.dumps import read_dumps
from tests.planner.windows import skewed_tokens, window_of

torch = pytest.importorskip("torch", reason="SGLang's dumps are torch files")


def write(path: Path, data: dict) -> Path:  # type: ignore[type-arg]
    torch.save(data, path)
    return path


def per_token(tokens: np.ndarray, expert_map: ExpertMap) -> dict:  # type: ignore[type-arg]
    """As SGLang writes it: physical ids int32 in eight columns, -1 where unused, one record per pass."""
    layers, count, k = tokens.shape
    table = expert_map.logical_to_all_physical()
    replica = (np.arange(count) % 2)[None, :, None]
    slot = np.stack([table[layer][tokens[layer]] for layer in range(layers)])
    second = np.where(slot[..., -1] >= 0, slot[..., -1], slot[..., 0])
    physical = np.where(replica == 1, second, slot[..., 0])
    padded = np.full((layers, count, 8), -1, np.int32)
    padded[:, :, :k] = physical
    half = count // 2
    records = [
        {"topk_ids_of_layer": torch.from_numpy(padded[:, part].copy()), "rank": 0}
        for part in (slice(half), slice(half, None))
    ]
    return {
        "records": records,
        "last_physical_to_logical_map": torch.from_numpy(expert_map.physical_to_logical.astype(np.int64)),
    }


def test_three_kinds_agree(tmp_path):  # type: ignore[no-untyped-def]
    tokens = skewed_tokens(np.random.default_rng(0), 3, 200, 16, 4)
    window = window_of(tokens, 16)
    steps = torch.from_numpy(np.stack([window.counts // 3, window.counts - window.counts // 3]))
    stat = write(
        tmp_path / "stat.pt", {"rank": 0, "logical_count": steps, "average_utilization_rate_over_window": None}
    )
    affinity = {
        "version": 1,
        "counts": torch.from_numpy(window.counts),
        "coactivation": torch.from_numpy(window.coactivation),
        "tokens": torch.from_numpy(tokens),
    }
    ours = write(tmp_path / "ours.pt", {"rank": 0, "logical_count": steps, "affinity": affinity})
    detail = write(tmp_path / "detail.pt", per_token(tokens, ExpertMap.contiguous(3, 16, 20)))

    assert (read_dumps([stat]).counts == window.counts).all()
    assert read_dumps([stat]).tokens is None
    for path in (ours, detail):
        read = read_dumps([path])
        assert (read.counts == window.counts).all()
        assert read.coactivation is not None and (read.coactivation == window.coactivation).all()
        assert read.tokens is not None and (np.sort(read.tokens, 2) == np.sort(tokens, 2)).all()


def test_several_ranks_add_up_and_the_sample_stays_bounded(tmp_path):  # type: ignore[no-untyped-def]
    tokens = skewed_tokens(np.random.default_rng(1), 2, 300, 16, 4)
    start = ExpertMap.contiguous(2, 16, 16)
    paths = [write(tmp_path / f"{i}.pt", per_token(tokens[:, i::2], start)) for i in range(2)]
    read = read_dumps(paths, sample_size=64)
    assert (read.counts == window_of(tokens, 16).counts).all()
    assert read.coactivation is not None and (read.coactivation == coactivation_of(tokens, 16)).all()
    assert read.tokens is not None and read.tokens.shape == (2, 64, 4)


def test_bad_dumps_are_named(tmp_path):  # type: ignore[no-untyped-def]
    tokens = skewed_tokens(np.random.default_rng(1), 2, 30, 16, 4)
    other = write(tmp_path / "other.pt", {"weights": torch.zeros(2)})
    newer = write(tmp_path / "newer.pt", {"affinity": {"version": 99}})
    small = write(tmp_path / "small.pt", per_token(tokens[:1], ExpertMap.contiguous(1, 16, 16)))
    large = write(tmp_path / "large.pt", per_token(tokens, ExpertMap.contiguous(2, 16, 16)))
    for paths, message in (
        ([other], "other.pt"),
        ([newer], "version 99"),
        ([large, small], "small.pt"),
        ([tmp_path / "no.pt"], "no.pt"),
    ):
        with pytest.raises(InputError, match=message) as error:
            read_dumps(paths)
        assert "\n" not in str(error.value)


def test_evaluate_reads_dumps_with_dense_layers(tmp_path):  # type: ignore[no-untyped-def]
    """A dump whose first layer is dense gives what a trace of the other layers gives."""
    ids = skewed_tokens(np.random.default_rng(2), 2, 60, 16, 4)  # [layers, tokens, k]
    tokens = np.full((3, 80, 4), -1, np.int16)
    tokens[1:, :60] = ids
    counts = np.stack([np.bincount(layer[layer >= 0].ravel(), minlength=16) for layer in tokens])
    dump = write(
        tmp_path / "dump.pt",
        {
            "affinity": {
                "version": 1,
                "counts": torch.from_numpy(counts),
                "coactivation": torch.from_numpy(coactivation_of(tokens, 16)),
                "tokens": torch.from_numpy(tokens),
            }
        },
    )
    RoutingTrace(np.ascontiguousarray(ids.transpose(1, 0, 2)), 16).save(tmp_path / "trace.npz")
    ExpertMap.contiguous(3, 16, 16).save(tmp_path / "three.json")
    ExpertMap.contiguous(2, 16, 16).save(tmp_path / "two.json")

    def evaluate(*arguments):  # type: ignore[no-untyped-def]
        return CliRunner().invoke(cli, ["evaluate", "--gpus", "4", "--format", "json", *map(str, arguments)])

    of_dump = json.loads(evaluate("--dump", dump, "--map", tmp_path / "three.json").output)
    of_trace = json.loads(evaluate("--trace", tmp_path / "trace.npz", "--map", tmp_path / "two.json").output)
    for key in ("gpu_fanout", "load_max_over_mean", "remote_gpu_copies", "tokens", "layers"):
        assert of_dump[key] == of_trace[key]
    wrong = evaluate("--dump", dump, "--map", tmp_path / "two.json")
    assert isinstance(wrong.exception, InputError) and "has 2 layers, but" in str(wrong.exception)
