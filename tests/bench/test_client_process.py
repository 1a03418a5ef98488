"""What the harness changes of SGLang, held against the text of the SGLang that is installed."""

import asyncio
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.harness.client_process import PAUSE_S, _Loop
from bench.harness.side_by_side import SIDE_BY_SIDE_ENVIRONMENT

SPEC = find_spec("sglang")
installed = pytest.mark.skipif(SPEC is None, reason="SGLang is not installed")


def text_of(path: str) -> str:
    assert SPEC is not None and SPEC.origin is not None
    return (Path(SPEC.origin).parent / path).read_text(encoding="utf-8")


def test_the_pause_before_a_load_is_left_out_and_arrivals_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    loop = _Loop()
    for seconds in (PAUSE_S, 0.25, 1.5):
        asyncio.run(loop.sleep(seconds))
    assert slept == [0.25, 1.5]
    assert loop.gather is asyncio.gather and loop.Semaphore is asyncio.Semaphore


@installed
def test_the_pause_is_sglangs_and_no_other_wait_takes_as_long() -> None:
    text = text_of("benchmark/serving.py")
    assert text.count(f"sleep({PAUSE_S})") == 1
    assert f"sleep({PAUSE_S})\n" in text.split("async def benchmark(", 1)[1]


@installed
def test_sglang_knows_the_variables_of_servers_side_by_side() -> None:
    known = text_of("srt/environ.py")
    for name in SIDE_BY_SIDE_ENVIRONMENT:
        assert not name.startswith("SGLANG_") or f"    {name} = Env" in known, name
