"""Greedy outputs do not change with placement, over at least 5 rebalances that moved experts.

By default a set of servers in which every pair of settings occurs; all combinations with EPLB_AFFINITY_FULL_MATRIX=1
(`make test-matrix`). The reference is the server without EPLB with the same parallel sizes, which at the same time
shows that the affinity recorder counts every token once.
"""

import itertools
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.figures.rebalance_log import LogSummary
from sglang_eplb_affinity.rebalance.verify import WRONG
from tests.server.conftest import free_port
from tests.server.harness import NUM_PROMPTS, RunningServer, ServerCase, prompts, serve

MODELS = ("qwen3moe", "dsv3")

# Eight runs of five factors of two levels in which every pair of levels occurs, on four references only.
PAIRWISE = [
    ("qwen3moe", 2, 0, False, "deepseek"),
    ("qwen3moe", 2, 4, False, "affinity"),
    ("qwen3moe", 4, 0, True, "affinity"),
    ("qwen3moe", 4, 4, True, "deepseek"),
    ("dsv3", 2, 0, True, "affinity"),
    ("dsv3", 2, 4, True, "deepseek"),
    ("dsv3", 4, 0, False, "deepseek"),
    ("dsv3", 4, 4, False, "affinity"),
]
ALL = list(itertools.product(MODELS, (2, 4), (0, 4), (False, True), ("deepseek", "affinity")))
# Rounds beside the forward passes; every map that is planned is applied.
ASYNC = ("--eplb-async", "--eplb-min-gain", "0")
ALL_ASYNC = [
    ServerCase(*case[:4], algorithm="affinity", iterations=6, extra=ASYNC)
    for case in itertools.product(MODELS, (2, 4), (0, 4), (False, True))
]
# Replicas by `cover`, and a recorder that leaves out passes: 3 of each 10 are recorded.
SAMPLED = ("--expert-affinity-record-every", "2", "--expert-affinity-record-last-passes", "6")
COVER = [
    ServerCase("qwen3moe", 2, 4, False, "affinity", extra=("--ep-dispatch-algorithm", rule, *SAMPLED))
    for rule in ("cover", "cover_balanced")
]
# Decode of up to 8 requests is a small pass, prefill a large one. With 0 none is, as over several nodes: the map is
# planned for another rule than it is served by.
PRIMARY = [
    ServerCase(
        "qwen3moe", 2, 4, False, algorithm,
        extra=("--ep-dispatch-algorithm", "primary", "--eplb-affinity-primary-tokens", tokens),
    )
    for algorithm, tokens in (("affinity", "8"), ("deepseek", "8"), ("affinity", "0"))
]  # fmt: skip
# Classes of SGLang that do not say which weights are their experts', and one that did not make redundant experts.
OTHER_CLASSES = [("glm4moe", 2, 4, False, "affinity"), ("qwen2moe", 2, 4, False, "deepseek")]
FULL = bool(os.environ.get("EPLB_AFFINITY_FULL_MATRIX"))
MATRIX = ALL if FULL else PAIRWISE
CASES = [*(ServerCase(*case) for case in [*MATRIX, *OTHER_CLASSES]), *COVER, *PRIMARY]
APART_TOKENS = 24
ASYNC_CASES = ALL_ASYNC if FULL else [ALL_ASYNC[6], ALL_ASYNC[-1]]


def test_the_default_cases_cover_every_pair_of_settings() -> None:
    for a, b in itertools.combinations(range(5), 2):
        assert len({(case[a], case[b]) for case in PAIRWISE}) == 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join((case.name, *case.extra[1:2])))
def test_outputs_equal_those_without_eplb(case: ServerCase, reference, models: Path, tmp_path: Path, port: int) -> None:
    expected = reference(case.model, case.ep, case.dp_attention)
    with serve(models / case.model, case.flags, tmp_path / "log", port=port, ranks=case.ep) as server:
        outputs = [result["output_ids"] for result in server.generate(prompts(NUM_PROMPTS))]
        log = server.rebalances()
    check(log, case, [outputs], expected)
    if case.extra and case.algorithm == "affinity":
        _, rule, *more = case.extra
        if rule == "primary":
            small = f"up to {more[1]} tokens of a rank; else " if more[1] != "0" else ""
            rule = f"primary ({small}cover_balanced)"
        assert f"dispatch {rule}, 4 redundant" in (tmp_path / "log").read_text(errors="replace")


@pytest.mark.parametrize("case", ASYNC_CASES, ids=lambda case: f"{case.name}-async")
def test_outputs_equal_those_without_eplb_while_rounds_run(
    case: ServerCase, reference, models: Path, tmp_path: Path, port: int
) -> None:
    expected = reference(case.model, case.ep, case.dp_attention)
    verify = {"EPLB_AFFINITY_VERIFY": "1"}
    with serve(models / case.model, case.flags, tmp_path / "log", port=port, ranks=case.ep, **verify) as server:
        batches = list(batches_until_moved(server, rebalances=5))
        log = server.rebalances()
    check(log, case, batches, expected)
    assert {rebalance.mode for rebalance in log.rebalances} == {"asynchronous"}
    text = (tmp_path / "log").read_text(errors="replace")
    assert WRONG not in text and "hold what the map says" in text


def test_outputs_equal_those_of_one_server_when_prefill_and_decode_are_apart(
    reference, models: Path, tmp_path: Path, port: int
) -> None:
    """Both rebalance, each for the passes that it runs; the KV cache goes through mooncake's stand-in."""
    case = ServerCase("qwen3moe", 2, 4, algorithm="affinity", iterations=6, extra=("--eplb-min-gain", "0"))
    expected = [output[:APART_TOKENS] for output in reference(case.model, case.ep, case.dp_attention)]
    bootstrap = free_port()
    apart = ("--disaggregation-transfer-backend", "mooncake", "--disaggregation-bootstrap-port", str(bootstrap))
    # Retracted requests are otherwise kept in pinned memory.
    roles = {"prefill": (), "decode": ("--disaggregation-decode-retraction-backup", "cpu_tensor")}
    with ExitStack() as stack:
        servers = {}
        for role, flags in roles.items():
            flags = (*case.flags, "--disaggregation-mode", role, "--disable-overlap-schedule", *apart, *flags)
            log = tmp_path / role
            serving = serve(models / case.model, list(flags), log, port=free_port(), ranks=case.ep)
            servers[role] = stack.enter_context(serving)
        batches = []
        for number in range(12):
            batches.append(_generate_apart(servers, bootstrap, 1 + number * NUM_PROMPTS))
            if all(server.rebalances().moved >= 2 for server in servers.values()):
                break
        logs = {role: server.rebalances() for role, server in servers.items()}
    for outputs in batches:
        assert outputs == expected
    assert min(log.moved for log in logs.values()) >= 2, logs


def _generate_apart(servers: dict[str, RunningServer], bootstrap: int, first_room: int) -> list[list[int]]:
    """Each request goes to both servers, which meet in a room of the prefill server's (0 is none)."""

    def one(number: int, prompt: str, pool: ThreadPoolExecutor) -> list[int]:
        sampling = {"temperature": 0, "max_new_tokens": APART_TOKENS, "ignore_eos": True}
        room = {"bootstrap_host": "127.0.0.1", "bootstrap_port": bootstrap, "bootstrap_room": first_room + number}
        body = {"text": prompt, "sampling_params": sampling, **room}
        answers = [pool.submit(server.post, "/generate", body) for server in servers.values()]
        return list(json.loads([answer.result() for answer in answers][1])["output_ids"])

    with ThreadPoolExecutor(5) as requests, ThreadPoolExecutor(10) as pool:
        numbered = enumerate(prompts(NUM_PROMPTS))
        return list(requests.map(lambda pair: one(*pair, pool), numbered))


def batches_until_moved(server: RunningServer, rebalances: int, most: int = 12) -> Iterator[list[list[int]]]:
    """Outputs of the same prompts again and again; few at once, so that the mix of words drifts within a batch."""
    for _ in range(most):
        yield [result["output_ids"] for result in server.generate(prompts(NUM_PROMPTS), concurrency=5)]
        if server.rebalances().moved >= rebalances:
            return


def check(log: LogSummary, case: ServerCase, batches: list[list[list[int]]], expected: list[list[int]]) -> None:
    assert log.moved >= 5, f"only {log.moved} of {len(log.rebalances)} rebalances moved experts"
    assert {rebalance.algorithm for rebalance in log.rebalances} == {case.algorithm}
    for outputs in batches:
        wrong = [index for index, pair in enumerate(zip(outputs, expected, strict=True)) if pair[0] != pair[1]]
        assert not wrong, f"outputs of prompts {wrong} changed over {log.moved} rebalances"
