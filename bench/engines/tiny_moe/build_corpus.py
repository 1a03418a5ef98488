"""Fetch the text, train the tokenizer, write the token files: ``python -m bench.engines.tiny_moe.build_corpus``.

Needs Debian's ``apt-get`` and ``dpkg-deb`` (nothing is installed) and the package ``tokenizers``. Writes into --out:
``tokenizer.json``; ``train.bin`` (uint16, shuffled documents, each ended by <|endoftext|>); ``val-DOMAIN.bin`` and
``test-DOMAIN.bin``; ``corpus.json`` (packages with versions, bytes and tokens).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from bench.engines.tiny_moe.exercises import documents as exercise_documents
from bench.engines.tiny_moe.sources import DOMAINS, FOREIGN, SOURCES

VOCABULARY = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EXERCISE_SHEETS = 1400
VALIDATION_SHARE, TEST_SHARE = 0.02, 0.03  # of documents, by hash of their text
DOMAIN_BYTES = 24_000_000  # at most this much text of a domain


def unpack(cache: Path) -> dict[str, str]:
    """Download and unpack each package once; returns {package: version}."""
    versions = {}
    for package in sorted({source.package for source in SOURCES}):
        folder = cache / package
        if not folder.exists():
            debs = cache / "deb"
            debs.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", "-q", package], cwd=debs, check=True)
            archive = next(debs.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg-deb", "-x", str(archive), str(folder)], check=True)
        archive = next((cache / "deb").glob(f"{package}_*.deb"))
        query = ["dpkg-deb", "-f", str(archive), "Version"]
        versions[package] = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    return versions


def read_documents(cache: Path) -> dict[str, list[tuple[str, str]]]:
    """{domain: [(package, document)]}; paragraphs that two domains share are dropped from the foreign languages."""
    raw: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for source in SOURCES:
        raw[source.domain] += [(source.package, document) for document in source.read(cache / source.package)]
    raw["math"] += [("(generated)", document) for document in exercise_documents(EXERCISE_SHEETS)]
    homes: dict[int, set[str]] = defaultdict(set)
    for domain, items in raw.items():
        for _, document in items:
            for paragraph in document.split("\n\n"):
                homes[hash(paragraph)].add(domain)
    out: dict[str, list[tuple[str, str]]] = {}
    for domain in DOMAINS:
        kept, seen = [], set()
        for package, document in raw[domain]:
            if domain in FOREIGN:
                document = "\n\n".join(p for p in document.split("\n\n") if len(homes[hash(p)]) == 1)
            if len(document) >= 200 and document not in seen:
                seen.add(document)
                kept.append((package, document))
        order = np.random.default_rng(0).permutation(len(kept))
        total, chosen = 0, []
        for index in order:
            total += len(kept[index][1].encode())
            if total > DOMAIN_BYTES:
                break
            chosen.append(kept[index])
        out[domain] = chosen
    return out


def split_of(document: str) -> str:
    fraction = int(hashlib.sha256(document.encode()).hexdigest()[:8], 16) / 0x100000000
    if fraction < VALIDATION_SHARE:
        return "val"
    return "test" if fraction < VALIDATION_SHARE + TEST_SHARE else "train"


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE; digits are single tokens, so that arithmetic is regular."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+| {2,}(?=\S)"), behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path(".carry/tiny_moe"), show_default=True)
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".cache/tiny_moe"), show_default=True)
def main(out: Path, cache: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    versions = unpack(cache)
    documents = read_documents(cache)
    # The tokenizer sees every domain equally.
    sample = [text for domain in DOMAINS for _, text in documents[domain][: 2_500_000 // 8_000]]
    tokenizer = train_tokenizer(sample)
    tokenizer.save(str(out / "tokenizer.json"))
    end = tokenizer.token_to_id(SPECIAL[0])
    train: list[np.ndarray] = []
    report: dict[str, dict[str, dict[str, int]]] = {}
    for domain in DOMAINS:
        held: dict[str, list[np.ndarray]] = {"val": [], "test": []}
        counts: dict[str, dict[str, int]] = defaultdict(lambda: {"bytes": 0, "tokens": 0, "documents": 0})
        items = documents[domain]
        for start in range(0, len(items), 512):
            chunk = items[start : start + 512]
            for (package, text), encoding in zip(chunk, tokenizer.encode_batch([t for _, t in chunk]), strict=True):
                ids = np.array([*encoding.ids, end], dtype=np.uint16)
                part = split_of(text)
                (train if part == "train" else held[part]).append(ids)
                entry = counts[package]
                entry["bytes"] += len(text.encode())
                entry["tokens"] += len(ids)
                entry["documents"] += 1
        for part, arrays in held.items():
            np.concatenate(arrays).tofile(out / f"{part}-{domain}.bin")
        report[domain] = dict(counts)
        print(domain, {k: v["tokens"] for k, v in counts.items()}, flush=True)
    order = np.random.default_rng(1).permutation(len(train))
    tokens = np.concatenate([train[i] for i in order])
    tokens.tofile(out / "train.bin")
    (out / "corpus.json").write_text(json.dumps({"versions": versions, "domains": report}, indent=1) + "\n")
    print(f"train: {len(tokens) / 1e6:.1f} M tokens")


if __name__ == "__main__":
    main()
