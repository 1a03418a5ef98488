"""Files that SGLang 0.5.23 wrote: two ranks of a tiny DeepSeek-V3 (1 dense and 3 MoE layers, 16 experts in 20 slots).

``sglang_0_5_23/``: the first 18 passes of the recorder's files (two requests, one after the other) and the responses to
those requests with ``return_routed_experts``; ``stat.pt`` is of a Qwen3 of 4 MoE layers. In ``per_pass`` both ranks had
all tokens, in ``per_token`` each its own (data-parallel attention).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from sglang_eplb_affinity.cli import cli
from sglang_eplb_affinity.formats.dumps import read_dumps
from sglang_eplb_affinity.formats.responses import read_responses

pytest.importorskip("torch", reason="SGLang's dumps are torch files")

DATA = Path(__file__).with_name("sglang_0_5_23")
EXPERTS, K, DENSE = 16, 4, 1
PROMPT, OUTPUT = 61, 9
DUMPS = {name: sorted(DATA.glob(f"{name}*.pt")) for name in ("per_pass", "per_token", "stat")}


def of_responses(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(int16 [tokens, layers, k] with the experts of each token in order, int64 [layers, experts] counts)."""
    ids = read_responses(DATA / name, EXPERTS, K, DENSE).topk_ids
    counts = np.stack([np.bincount(layer.ravel(), minlength=EXPERTS) for layer in ids.transpose(1, 0, 2)])
    return np.sort(ids, axis=2), counts


def test_responses_and_dumps_are_the_same_routing() -> None:
    _, counts = of_responses("generate_tensor_parallel.jsonl")
    for path in DUMPS["per_pass"]:
        window = read_dumps([path])
        assert window.tokens is None and not window.counts[:DENSE].any()
        assert (window.counts[DENSE:] == counts).all()
    ids, _ = of_responses("generate_data_parallel.jsonl")
    first, second = (read_dumps([path]) for path in DUMPS["per_token"])
    assert first.tokens is not None and second.tokens is not None
    assert (np.sort(first.tokens[DENSE:], 2) == ids[: PROMPT + OUTPUT - 1].transpose(1, 0, 2)).all()
    # of a decoding pass SGLang records row 0 of all ranks' tokens on each rank: only rank 0's is its own
    prompt = len(second.tokens[0]) - OUTPUT + 1
    assert (
        np.sort(second.tokens[DENSE:, :prompt], 2) == ids[-len(second.tokens[0]) :][:prompt].transpose(1, 0, 2)
    ).all()


def test_responses_of_the_openai_api_and_of_a_batch() -> None:
    for name, sequences in (("completions.jsonl", 1), ("batch.jsonl", 3)):
        trace = read_responses(DATA / name, EXPERTS, K, DENSE)
        assert trace.topk_ids.shape[1:] == (3, K) and trace.sequence is not None
        assert trace.sequence.max() + 1 == sequences


def test_steps_are_added_up() -> None:
    window = read_dumps(DUMPS["stat"])
    assert window.counts.shape == (4, EXPERTS) and len(set(window.counts.sum(1).tolist())) == 1


@pytest.mark.parametrize("mode", DUMPS)
def test_every_command_takes_them(mode: str, tmp_path: Path) -> None:
    dumps = [word for path in DUMPS[mode] for word in ("--dump", str(path))]
    rest = ["--gpus", "2", "--dense-layers", "0" if mode == "stat" else "1"]
    placed = tmp_path / "map.json"
    for words in (
        ["plan", *dumps, *rest, "--redundant", "4", "--effort", "fast", "--out", str(placed)],
        ["evaluate", *dumps, *rest, "--map", str(placed)],
        ["inspect", *dumps, *rest, "--map", str(placed), "--plot", str(tmp_path / "dump.png")],
        ["convert", "--in", str(placed), *rest, "--to", "vllm-ascend", "--out", str(tmp_path / "ascend.json")],
    ):
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == 0, (words, result.exception)
