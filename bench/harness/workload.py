"""Which requests a cell sends, the same for every arm: prompts of text that fit, or random token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.harness.profile import LoadConfig
from bench.harness.sharegpt import Turn
from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically

# No tokenizer in use makes tokens longer than this many characters on average; spares encoding huge prompts.
_MAX_CHARACTERS_PER_TOKEN = 16
FIRST_AND_LAST = 1 << 20  # tokens at a time of a stream that is not measured: more than any request has
MIN_OUTPUT_TOKENS = 2  # fewer have no time between tokens


class Tokenizer(Protocol):
    def encode(self, text: str, /) -> list[int]: ...

    def decode(self, ids: list[int], /) -> str: ...


@dataclass(frozen=True)
class Request:
    """One request: a text or token ids, their number of tokens, and how many tokens are to be generated.
    ``stream_interval``: tokens that its stream brings at a time; 0: as the server does it."""

    prompt: str | list[int]
    input_tokens: int
    output_tokens: int
    stream_interval: int = 0


@dataclass(frozen=True)
class Workload:
    """The requests of one cell, in a file that :func:`requests_of` reads."""

    path: Path
    requests: int
    output_tokens: int  # of all requests together
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


def select_prompts(
    turns: Sequence[Turn], tokenizer: Tokenizer, load: LoadConfig, count: int, seed: int
) -> list[tuple[str, int]]:
    """``count`` prompts in random order (seeded), all within the profile's limits of input tokens, each with them."""
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


def _within(texts: Iterator[str], tokenizer: Tokenizer, load: LoadConfig) -> Iterator[tuple[str, int]]:
    shortest, longest = load.input_tokens
    for text in texts:
        if len(text) > longest * _MAX_CHARACTERS_PER_TOKEN:
            continue
        size = len(tokenizer.encode(text))
        if shortest <= size <= longest:
            yield text, size


def _exact(texts: Iterator[str], tokenizer: Tokenizer, load: LoadConfig) -> Iterator[tuple[str, int]]:
    """Prompts joined until they have the wanted number of tokens, then cut (bench_serving's `random` repeats one
    prompt instead, which makes the routing of a long prompt less varied than real text is)."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text[: load.exact_input_tokens * _MAX_CHARACTERS_PER_TOKEN])
        if len(ids) >= load.exact_input_tokens:
            yield tokenizer.decode(ids[: load.exact_input_tokens]), load.exact_input_tokens
            ids = []


def output_lengths(load: LoadConfig, count: int, concurrency: int, seed: int) -> list[int]:
    """Output tokens of each request of a cell.

    Requests of one length that start together also end together, so a closed loop would swing between a burst of
    prefills and pure decoding. With ``load.stagger`` the first ``concurrency`` requests are shortened to evenly spaced
    parts of the length, in random order: from then on requests end, and begin, one after another. Where the server
    gathers prompts into full passes, those of a pass end together again, and passes come singly or in pairs as it
    happens; ``load.output_spread`` draws lengths that differ.
    """
    random = np.random.default_rng(seed)
    least, most = load.output_tokens - load.output_spread, load.output_tokens + load.output_spread
    lengths = random.integers(least, most, count, endpoint=True).tolist() if most > least else [most] * count
    first = min(concurrency, count)
    if load.stagger and not load.request_rate and first > 1:
        parts = random.permutation(first) + 1
        lengths[:first] = [max(MIN_OUTPUT_TOKENS, round(load.output_tokens * part / first)) for part in parts.tolist()]
    return lengths


def write_texts(path: Path, prompts: Sequence[tuple[str, int]], lengths: Sequence[int], streams: int = 0) -> Workload:
    """Write requests of texts, each with its number of tokens; ``streams`` as LoadConfig's ``token_streams``."""
    texts, sizes = [prompt for prompt, _ in prompts], [n for _, n in prompts]
    return _write(path, {"texts": texts, "input_tokens": sizes, "output_tokens": list(lengths)}, streams)


def write_random_ids(path: Path, load: LoadConfig, vocabulary: int, lengths: Sequence[int], seed: int) -> Workload:
    """Write requests of random token ids, for models whose routing is forced anyway; only the recipe is written."""
    shortest, longest = (load.exact_input_tokens,) * 2 if load.exact_input_tokens else load.input_tokens
    sizes = np.random.default_rng(seed).integers(shortest, longest, len(lengths), endpoint=True)
    recipe = {"seed": seed, "vocabulary": vocabulary}
    content = {"random_ids": recipe, "input_tokens": sizes.tolist(), "output_tokens": list(lengths)}
    return _write(path, content, load.token_streams)


def requests_of(path: Path) -> list[Request]:
    """The requests of a file that this module wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    sizes = data["input_tokens"]
    prompts = data.get("texts")
    if prompts is None:
        recipe = data["random_ids"]
        ids = np.random.default_rng(recipe["seed"]).integers(0, recipe["vocabulary"], sum(sizes)).tolist()
        ends = np.cumsum(sizes).tolist()
        prompts = [ids[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    streams = data.get("token_streams", 0)
    intervals = [1 if i < streams else FIRST_AND_LAST if streams else 0 for i in range(len(sizes))]
    return [Request(*row) for row in zip(prompts, sizes, data["output_tokens"], intervals, strict=True)]


def vocabulary_of(model: str) -> int:
    """Token ids that a model path or hub id knows; raises InputError when its configuration does not say."""
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(model, trust_remote_code=False)
        return int(getattr(config, "text_config", config).vocab_size)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"--model: {model!r} does not say its vocabulary ({str(error).splitlines()[0]})") from None


def _write(path: Path, content: dict[str, Any], streams: int = 0) -> Workload:
    if streams:
        content["token_streams"] = streams
    data = json.dumps(content, ensure_ascii=False).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)
    lengths = content["output_tokens"]
    return Workload(path, len(lengths), sum(lengths), hashlib.sha256(data).hexdigest())
