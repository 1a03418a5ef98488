from dataclasses import replace
from pathlib import Path

import pytest

from bench.harness.profile import LoadConfig
from bench.harness.sharegpt import Turn
from bench.harness.workload import output_lengths, requests_of, select_prompts, write_random_ids, write_texts
from sglang_eplb_affinity.domain.errors import InputError


class Words:
    """A tokenizer with one token a character."""

    def encode(self, text: str, /) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: list[int], /) -> str:
        return "".join(map(chr, ids))


TURNS = [Turn("x" * n, "answer") for n in range(1, 101)]
LOAD = LoadConfig(requests={1: 4}, output_tokens=8, input_tokens=(10, 50))


def test_prompts_fit_and_depend_on_the_seed_only() -> None:
    chosen = select_prompts(TURNS, Words(), LOAD, 20, seed=3)
    assert all(10 <= len(prompt) == size <= 50 for prompt, size in chosen) and len(set(chosen)) == 20
    assert chosen == select_prompts(TURNS, Words(), LOAD, 20, seed=3)
    assert chosen != select_prompts(TURNS, Words(), LOAD, 20, seed=4)


def test_exact_length() -> None:
    chosen = select_prompts(TURNS, Words(), replace(LOAD, exact_input_tokens=64), 20, seed=3)
    assert {(len(prompt), size) for prompt, size in chosen} == {(64, 64)}


def test_too_few_prompts_is_an_error_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"only 41 prompts .* needs 42"):
        select_prompts(TURNS, Words(), LOAD, 42, seed=0)


def test_texts_are_read_back_and_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    prompts = [('quotes "', 8), ("line\nbreak", 10), ("ünï\u2028code", 8)]
    first = write_texts(tmp_path / "a" / "w.json", prompts, [4, 8, 8])
    assert [(r.prompt, r.input_tokens, r.output_tokens) for r in requests_of(first.path)] == [
        ('quotes "', 8, 4),
        ("line\nbreak", 10, 8),
        ("ünï\u2028code", 8, 8),
    ]
    assert (first.requests, first.output_tokens) == (3, 20)
    assert write_texts(tmp_path / "b.json", prompts, [4, 8, 8]).sha256 == first.sha256
    assert write_texts(tmp_path / "c.json", prompts, [4, 8, 9]).sha256 != first.sha256


def test_random_ids_are_made_from_a_recipe(tmp_path: Path) -> None:
    work = write_random_ids(tmp_path / "w.json", LOAD, 100, [8] * 30, seed=5)
    requests = requests_of(work.path)
    assert all(len(r.prompt) == r.input_tokens and 10 <= r.input_tokens <= 50 for r in requests)
    ids = [i for r in requests for i in r.prompt]
    assert min(ids) >= 0 and max(ids) <= 99 and len(set(ids)) > 80  # type: ignore[type-var, operator]
    assert requests == requests_of(write_random_ids(tmp_path / "x.json", LOAD, 100, [8] * 30, seed=5).path)
    assert requests != requests_of(write_random_ids(tmp_path / "y.json", LOAD, 100, [8] * 30, seed=6).path)
    exact = write_random_ids(tmp_path / "z.json", replace(LOAD, exact_input_tokens=7), 100, [8], seed=5)
    assert requests_of(exact.path)[0].input_tokens == 7


def test_lengths_that_differ_do_not_end_together() -> None:
    load = replace(LOAD, output_tokens=48, output_spread=16)
    lengths = output_lengths(load, 3000, 16, seed=1)
    assert (min(lengths), max(lengths)) == (32, 64) and len(set(lengths)) == 33
    assert 47 < sum(lengths) / len(lengths) < 49
    staggered = output_lengths(replace(load, stagger=True), 3000, 16, seed=1)
    assert sorted(staggered[:16]) == list(range(3, 49, 3)) and staggered[16:] == lengths[16:]


def test_the_first_requests_of_a_closed_loop_end_one_after_another() -> None:
    load = replace(LOAD, output_tokens=64, stagger=True)
    lengths = output_lengths(load, 40, 16, seed=1)
    assert sorted(lengths[:16]) == list(range(4, 65, 4)) and lengths[16:] == [64] * 24
    assert lengths == output_lengths(load, 40, 16, seed=1) != output_lengths(load, 40, 16, seed=2)
    assert min(output_lengths(load, 400, 300, seed=1)) == 2
    assert set(output_lengths(replace(load, stagger=False), 40, 16, seed=1)) == {64}
    assert set(output_lengths(replace(load, request_rate=5.0), 40, 16, seed=1)) == {64}
