"""Corpus readers, exercises and batches."""

from __future__ import annotations

import re
import struct
from random import Random

import pytest

from bench.engines.tiny_moe import exercises, sources


def test_html_keeps_paragraphs_and_drops_menus() -> None:
    page = (
        "<html><head><title>no</title></head><body><nav><p>menu</p></nav><p>One <b>bold</b>\n word &amp; more</p>"
        "<script>x()</script><pre>a\n  b</pre><ul><li>item</li></ul></body></html>"
    )
    assert sources.html_paragraphs(page) == ["One bold word & more", "a\n  b", "item"]


def test_split_cuts_at_paragraphs_and_loses_nothing_but_short_tails() -> None:
    paragraphs = [f"paragraph {i} " + "x" * 990 for i in range(50)]
    documents = list(sources.split("\n\n".join(paragraphs)))
    assert "\n\n".join(documents).split("\n\n") == paragraphs
    assert all(len(d) < sources.DOCUMENT_BYTES + 2_000 for d in documents)
    assert list(sources.split("short")) == []


def test_r_strings_reads_a_character_vector() -> None:
    words = ["Emma", "", "déjà"]
    data = b"X\n" + struct.pack(">iii", 3, 1, 2) + struct.pack(">ii", 16, len(words))
    for word in words:
        data += struct.pack(">ii", 0x00040009, len(word.encode())) + word.encode()
    assert list(sources._r_strings(data + struct.pack(">i", 0xFE))) == words


@pytest.mark.parametrize("seed", range(40))
def test_exercise_answers_are_right(seed: int) -> None:
    r = Random(seed)
    text = exercises._addition(r)
    a, b = map(int, re.findall(r"Compute (\d+) \+ (\d+)", text)[0])
    digits = re.findall(r"write (\d)", text)
    assert int("".join(reversed(digits))) == a + b == int(text.split("Answer: ")[1])
    text = exercises._multiplication(r)
    a, b = map(int, re.findall(r"Compute (\d+) \* (\d+)", text)[0])
    assert int(text.split("Answer: ")[1]) == a * b
    text = exercises._modular(r)
    base, exponent, modulus = map(int, re.findall(r"Compute (\d+)\^(\d+) modulo (\d+)", text)[0])
    assert int(text.split("Answer: ")[1]) == pow(base, exponent, modulus)
    text = exercises._quadratic(r)
    left = re.findall(r"Solve (.*) = 0", text)[0]
    for root in re.findall(r"x = (-?\d+)", text.split("Answer: ")[1]):
        assert eval(re.sub(r"(\d)x", r"\1*x", left).replace("^", "**"), {"x": int(root)}) == 0
    text = exercises._derivative(r)
    poly = re.findall(r"f\(x\) = (.*?)\. Find", text)[0]
    at = int(re.findall(r"f'\((-?\d+)\)\.", text)[0])
    f = re.sub(r"(\d)x", r"\1*x", poly).replace("^", "**")
    slope = (eval(f, {"x": at + 1e-5}) - eval(f, {"x": at - 1e-5})) / 2e-5
    assert int(text.rsplit("= ", 1)[1]) == pytest.approx(slope, abs=1e-2)
    text = exercises._integral(r)
    low, high, poly = re.findall(r"int_\{(-?\d+)\}\^\{(-?\d+)\} \((.*)\) ", text)[0]
    f = re.sub(r"(\d)x", r"\1*x", poly).replace("^", "**")
    steps = 2000
    width = (int(high) - int(low)) / steps
    area = sum(eval(f, {"x": int(low) + (i + 0.5) * width}) for i in range(steps)) * width
    assert int(text.split("Answer: ")[1]) == pytest.approx(area, abs=0.05)


def test_exercises_are_deterministic_and_differ() -> None:
    first = list(exercises.documents(3, seed=5))
    assert first == list(exercises.documents(3, seed=5))
    assert len(set(first)) == 3


def test_every_domain_has_a_source() -> None:
    assert {source.domain for source in sources.SOURCES} == set(sources.DOMAINS)
    assert all(source.licence and source.version for source in sources.SOURCES)
