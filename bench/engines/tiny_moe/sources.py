"""The text the model is trained on: Debian packages, their licences, and how each is turned into documents.

Nothing of the text is kept in the repository. ``build_corpus`` fetches the packages with ``apt-get download``
(Debian 12), unpacks them without installing, and calls the readers below.
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

DOCUMENT_BYTES = 16_000  # long texts are cut into documents of about this size, at a paragraph


@dataclass(frozen=True)
class Source:
    """``read`` yields documents (str) from the folder that holds the unpacked package."""

    package: str
    version: str  # the version the committed model was trained on
    domain: str
    licence: str
    read: Callable[[Path], Iterator[str]]


class _Paragraphs(HTMLParser):
    """Text of block elements; navigation, scripts and tables of contents are skipped."""

    BLOCKS = frozenset(["p", "h1", "h2", "h3", "h4", "h5", "li", "dt", "dd", "pre", "td", "th", "div"])
    SKIP = frozenset(["script", "style", "head", "header", "nav", "aside", "footer", "button"])

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._skipping = 0
        self._pre = 0

    def _flush(self) -> None:
        text = "".join(self._text)
        text = text.strip("\n") if self._pre else " ".join(text.split())
        if text.strip():
            self.paragraphs.append(text)
        self._text = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS:
            self._flush()
        self._skipping += tag in self.SKIP
        self._pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self.BLOCKS:
            self._flush()
        self._skipping = max(0, self._skipping - (tag in self.SKIP))
        self._pre = max(0, self._pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if not self._skipping:
            self._text.append(data)


def html_paragraphs(text: str) -> list[str]:
    parser = _Paragraphs()
    parser.feed(text)
    parser.close()
    return parser.paragraphs


def _html(pattern: str) -> Callable[[Path], Iterator[str]]:
    """Documents of the HTML files that match; paragraphs seen before (menus, untranslated boilerplate) are dropped."""

    def read(root: Path) -> Iterator[str]:
        seen: set[str] = set()
        for path in sorted(root.glob(pattern)):
            kept = []
            for paragraph in html_paragraphs(path.read_text(encoding="utf-8", errors="replace")):
                if len(paragraph) >= 30 and paragraph not in seen:
                    seen.add(paragraph)
                    kept.append(paragraph)
            yield from split("\n\n".join(kept))

    return read


def _files(*patterns: str, exclude: str = r"$^") -> Callable[[Path], Iterator[str]]:
    def read(root: Path) -> Iterator[str]:
        for path in sorted({p for pattern in patterns for p in root.glob(pattern)}):
            if path.is_file() and not re.search(exclude, str(path)):
                data = path.read_bytes()
                data = gzip.decompress(data) if path.suffix == ".gz" else data
                yield from split(data.decode("utf-8", errors="replace"))

    return read


def split(text: str) -> Iterator[str]:
    """Cut at blank lines into documents of about DOCUMENT_BYTES; leftovers under 200 characters are dropped."""
    parts: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        if not paragraph.strip():
            continue
        parts.append(paragraph.strip("\n"))
        size += len(paragraph)
        if size >= DOCUMENT_BYTES:
            yield "\n\n".join(parts)
            parts, size = [], 0
    if size >= 200:
        yield "\n\n".join(parts)


def _novels(root: Path) -> Iterator[str]:
    """R's lazy-load database: zlib chunks after a 4-byte length; strings are XDR CHARSXP records (R internals, 1.8)."""
    blob = next(root.glob("**/data/Rdata.rdb")).read_bytes()
    at = 0
    for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", blob):
        if match.start() < at:
            continue
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(blob[match.start() :])
        except zlib.error:
            continue
        if not inflate.eof:
            continue
        at = len(blob) - len(inflate.unused_data)
        yield from split("\n".join(_r_strings(data)))


def _r_strings(data: bytes) -> Iterator[str]:
    """The elements of an XDR serialised character vector: flags (type 9 in the low byte), length, bytes."""
    at = data.find(b"\x00\x00\x00\x10")  # STRSXP
    at = at + 8 if at >= 0 else len(data)
    while at + 8 <= len(data):
        flags, length = struct.unpack(">Ii", data[at : at + 8])
        if flags & 0xFF != 9:
            break
        at += 8
        yield data[at : at + max(length, 0)].decode("utf-8", errors="replace")
        at += max(length, 0)


def _dictionary(root: Path) -> Iterator[str]:
    """Every third document, or the dictionary would be most of the English prose."""
    text = gzip.decompress(next(root.glob("**/gcide.dict.dz")).read_bytes()).decode("utf-8", errors="replace")
    text = re.sub(r"\n *\[(1913 Webster|PJC|WordNet[^]]*|GNU[^]]*)\]", "", text)
    for index, document in enumerate(split(text)):
        if index % 3 == 0:
            yield document


def _metamath(root: Path) -> Iterator[str]:
    """Comments and statements of set.mm; compressed proofs ($= ... $.) carry no text and are cut out."""
    text = next(root.glob("**/databases/set.mm")).read_text(encoding="utf-8")
    text = re.sub(r"\$=.*?\$\.", "$.", text, flags=re.S)
    text = re.sub(r"\((Contributed|Revised|Proof shortened|New usage|Proof modification)[^)]*\)", "", text)
    text = re.sub(r"[ \t]*\n[ \t]+", "\n ", text)
    for index, document in enumerate(split(text)):
        if index % 2 == 0:
            yield document


GIMP, OFFICE = "GFDL-1.2+, no invariant sections", "MPL-2.0"
HANDBOOK = "GPL-2+ or CC-BY-SA-3.0"
NOT_CODE = (
    r"/(test|tests|testdata|idlelib|lib2to3)/|_test\.go$|/tables\.go$|/zerrors_|/zsysnum_|/zsyscall_|/ztypes_|/op[A-Z]"
)
GO_DIRS = [
    "archive",
    "bufio",
    "bytes",
    "compress",
    "container",
    "context",
    "crypto",
    "database",
    "encoding",
    "errors",
    "fmt",
    "go",
    "hash",
    "html",
    "image",
    "io",
    "log",
]
GO_DIRS += [
    "math",
    "mime",
    "net",
    "os",
    "path",
    "reflect",
    "regexp",
    "runtime",
    "sort",
    "strconv",
    "strings",
    "sync",
    "testing",
    "text",
    "time",
    "internal",
]


def _handbook(language: str) -> Callable[[Path], Iterator[str]]:
    return _html(f"usr/share/doc/debian-handbook/html/{language}/*.html")


SOURCES: tuple[Source, ...] = (
    Source("r-cran-janeaustenr", "1.0.0-1", "prose", "MIT (texts: public domain)", _novels),
    Source("anarchism", "15.3-3", "prose", "GPL-2+", _files("usr/share/doc/anarchism/markdown/*.md*")),
    Source("dict-gcide", "0.48.5+nmu2", "prose", "GPL-2+ (text of 1913: public domain)", _dictionary),
    Source("debian-handbook", "11.20220922", "prose", HANDBOOK, _handbook("en-US")),
    Source("libpython3.11-minimal", "3.11.2", "code", "PSF-2.0", _files("usr/lib/**/*.py", exclude=NOT_CODE)),
    Source("libpython3.11-stdlib", "3.11.2", "code", "PSF-2.0", _files("usr/lib/**/*.py", exclude=NOT_CODE)),
    Source(
        "golang-1.19-src",
        "1.19.8-2",
        "code",
        "BSD-3-Clause",
        _files(*(f"usr/share/go-1.19/src/{name}/**/*.go" for name in GO_DIRS), exclude=NOT_CODE),
    ),
    Source(
        "rust-src",
        "1.63.0+dfsg1-2",
        "code",
        "MIT or Apache-2.0",
        _files(*(f"usr/src/rustc-*/library/{name}/src/**/*.rs" for name in ("alloc", "core", "std")), exclude=NOT_CODE),
    ),
    Source("metamath-databases", "0.0.0~20210101.git55fe226-2", "math", "CC0-1.0", _metamath),
    Source("gimp-help-de", "2.10.34-2", "german", GIMP, _html("usr/share/**/de/*.html")),
    Source("libreoffice-help-de", "7.4.7", "german", OFFICE, _html("usr/**/*.html")),
    Source("debian-handbook", "11.20220922", "german", HANDBOOK, _handbook("de-DE")),
    Source("gimp-help-fr", "2.10.34-2", "french", GIMP, _html("usr/share/**/fr/*.html")),
    Source("libreoffice-help-fr", "7.4.7", "french", OFFICE, _html("usr/**/*.html")),
    Source("debian-handbook", "11.20220922", "french", HANDBOOK, _handbook("fr-FR")),
    Source("gimp-help-es", "2.10.34-2", "spanish", GIMP, _html("usr/share/**/es/*.html")),
    Source("libreoffice-help-es", "7.4.7", "spanish", OFFICE, _html("usr/**/*.html")),
    Source("debian-handbook", "11.20220922", "spanish", HANDBOOK, _handbook("es-ES")),
    Source("gimp-help-ru", "2.10.34-2", "russian", GIMP, _html("usr/share/**/ru/*.html")),
    Source("libreoffice-help-ru", "7.4.7", "russian", OFFICE, _html("usr/**/*.html")),
    Source("debian-handbook", "11.20220922", "russian", HANDBOOK, _handbook("ru-RU")),
)

DOMAINS = ("prose", "code", "math", "german", "french", "spanish", "russian")
FOREIGN = frozenset(("german", "french", "spanish", "russian"))  # untranslated paragraphs are dropped from these
