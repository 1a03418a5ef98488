"""Which prompts a cell sends: chosen with the served model's tokenizer so that they fit, the same for every arm."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.profile import LoadConfig
from bench.sharegpt import Turn
from sglang_eplb_affinity.errors import InputError
from sglang_eplb_affinity.files import write_atomically

# No tokenizer in use makes tokens longer than this many characters on average; spares encoding huge prompts.
_MAX_CHARACTERS_PER_TOKEN = 16


class Tokenizer(Protocol):
    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, ids: list[int], /) -> str: ...


@dataclass(frozen=True)
class Workload:
    """The prompts of one cell, in a file of bench_serving's `custom` format."""

    path: Path
    requests: int
    sha256: str


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a model path or hub id."""
    from transformers import AutoTokenizer, logging  # slow to import, and only needed for a real run

    logging.set_verbosity_error()  # it would warn of every prompt that is too long to be chosen
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"--model: no tokenizer could be loaded from {model!r} ({str(error).splitlines()[0]})"
        ) from None
    loaded: Tokenizer = tokenizer
    return loaded


def select_prompts(turns: Sequence[Turn], tokenizer: Tokenizer, load: LoadConfig, count: int, seed: int) -> list[str]:
    """``count`` prompts in random order (seeded), all within the profile's limits of input tokens."""
    order = np.random.default_rng(seed).permutation(len(turns))
    texts = (turns[i].prompt for i in order)
    pick = _exact(texts, tokenizer, load) if load.exact_input_tokens else _within(texts, tokenizer, load)
    prompts = [prompt for prompt, _ in zip(pick, range(count), strict=False)]
    if len(prompts) < count:
        raise InputError(
            f"ShareGPT: only {len(prompts)} prompts fit the profile's input tokens, but a cell needs {count}; "
            "give a larger file with --sharegpt or fewer requests"
        )
    return prompts


def _within(texts: Iterator[str], tokenizer: Tokenizer, load: LoadConfig) -> Iterator[str]:
    shortest, longest = load.input_tokens
    for text in texts:
        if len(text) <= longest * _MAX_CHARACTERS_PER_TOKEN and shortest <= len(tokenizer.encode(text)) <= longest:
            yield text


def _exact(texts: Iterator[str], tokenizer: Tokenizer, load: LoadConfig) -> Iterator[str]:
    """Prompts joined until they have the wanted number of tokens, then cut (bench_serving's `random` repeats one
    prompt instead, which makes the routing of a long prompt less varied than real text is)."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text[: load.exact_input_tokens * _MAX_CHARACTERS_PER_TOKEN])
        if len(ids) >= load.exact_input_tokens:
            yield tokenizer.decode(ids[: load.exact_input_tokens])
            ids = []


def write_workload(path: Path, prompts: Sequence[str]) -> Workload:
    """Write prompts as JSON Lines; the answers are not used (the output length is fixed), so they are left out."""
    rows = [json.dumps({"conversations": [{"content": p}, {"content": "-"}]}, ensure_ascii=False) for p in prompts]
    data = ("\n".join(rows) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    return Workload(path, len(prompts), hashlib.sha256(data).hexdigest())


def read_prompts(path: Path) -> list[str]:
    return [json.loads(line)["conversations"][0]["content"] for line in path.read_text("utf-8").split("\n") if line]
