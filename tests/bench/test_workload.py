from dataclasses import replace
from pathlib import Path

import pytest

from bench.profile import LoadConfig
from bench.sharegpt import Turn
from bench.workload import read_prompts, select_prompts, write_workload
from sglang_eplb_affinity.errors import InputError


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
    assert all(10 <= len(prompt) <= 50 for prompt in chosen) and len(set(chosen)) == 20
    assert chosen == select_prompts(TURNS, Words(), LOAD, 20, seed=3)
    assert chosen != select_prompts(TURNS, Words(), LOAD, 20, seed=4)


def test_exact_length() -> None:
    chosen = select_prompts(TURNS, Words(), replace(LOAD, exact_input_tokens=64), 20, seed=3)
    assert {len(prompt) for prompt in chosen} == {64}


def test_too_few_prompts_is_an_error_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"only 41 prompts .* needs 42"):
        select_prompts(TURNS, Words(), LOAD, 42, seed=0)


def test_file_is_read_back_and_its_digest_is_that_of_its_content(tmp_path: Path) -> None:
    prompts = ['quotes "', "line\nbreak", "ünï\u2028code"]
    first = write_workload(tmp_path / "a" / "w.jsonl", prompts)
    assert read_prompts(first.path) == prompts and first.requests == 3
    assert write_workload(tmp_path / "b.jsonl", prompts).sha256 == first.sha256
    assert write_workload(tmp_path / "c.jsonl", prompts[:2]).sha256 != first.sha256
