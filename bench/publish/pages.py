"""Every file of the documentation that is made, or has parts that are made: `python -m bench docs`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.capacity.docs import filled
from bench.harness.engine import ROOT
from bench.publish.drawings import example, gains_drawing, token_drawing
from bench.publish.flags_page import flags_page, newest_series
from bench.publish.models_page import installed, models_page
from bench.publish.result_blocks import update_blocks
from bench.publish.results_page import results_page
from bench.publish.summary import Figure

TABLES = {"capacity_results.md": "simulate"}
"""Pages with tables of a folder of results/."""


def made_pages(figures: Sequence[Figure], root: Path = ROOT) -> dict[Path, str]:
    """The whole text of each such file, by its path; what has no marker and is not made as a whole is left out."""
    docs = root / "docs"
    found = {
        docs / "results.md": results_page(figures),
        docs / "flags.md": flags_page(root),
        docs / "images" / "token.svg": token_drawing(),
        docs / "images" / "gains.svg": gains_drawing(figures),
    }
    classes = installed()
    if classes is not None and classes[0] == newest_series(root).name:  # else it stays as it was made
        found[docs / "models.md"] = models_page(*classes)
    for page in [root / "README.md", *sorted(docs.glob("*.md"))]:
        if page in found or not page.is_file():
            continue
        old = page.read_text(encoding="utf-8")
        new = update_blocks(old, figures, str(page), {"example": _example()})
        if page.name in TABLES:
            new = filled(new, root / "results" / TABLES[page.name])
        if new != old or "<!-- results:begin " in old or "<!-- table: " in old:
            found[page] = new
    return found


def _example() -> str:
    """What the example prints."""
    return f"```\n{example().output}```\n"
