"""What stands between markers of a Markdown file, made from results/summary.json.

``<!-- results:begin NAME -->`` and ``<!-- results:end NAME -->``, at the beginning of lines, enclose one block. NAME is
`headline` (the table of the README), or a prefix of entry names: `bench.cpu` takes `bench.cpu.qps...` and all others
below it; several are separated by commas.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from bench.publish.catalogue import natural
from bench.publish.figure_tables import figure_tables
from bench.publish.headline_table import headline_table
from bench.publish.summary import Figure
from sglang_eplb_affinity.domain.errors import InputError

_BLOCK = re.compile(
    r"^(?P<begin><!-- results:begin (?P<name>[\w.,-]+) -->\n)(?P<body>.*?)(?P<end>^<!-- results:end (?P=name) -->)",
    re.DOTALL | re.MULTILINE,
)
_MARKER = re.compile(r"^<!-- results:(?:begin|end) [\w.,-]+ -->$", re.MULTILINE)


def update_blocks(
    text: str, figures: Sequence[Figure], source: str, others: Mapping[str, str] = MappingProxyType({})
) -> str:
    """``text`` with every marked block made anew, those named in ``others`` by what stands there.

    Raises InputError for a marker without its partner.
    """
    blocks = list(_BLOCK.finditer(text))
    if len(_MARKER.findall(text)) != 2 * len(blocks):
        raise InputError(f"{source}: a `results:begin NAME` marker has no `results:end NAME` of the same name")
    return _BLOCK.sub(lambda m: m["begin"] + _block(figures, m["name"], others) + m["end"], text)


def _block(figures: Sequence[Figure], name: str, others: Mapping[str, str]) -> str:
    """Empty where nothing was measured."""
    if name in others:
        return others[name]
    if name == "headline":
        return headline_table(figures)
    prefixes = name.split(",")
    found = [figure for figure in figures if any(f"{figure.name}.".startswith(f"{p}.") for p in prefixes)]
    drop = prefixes[0].split(".") if len(prefixes) == 1 else ()
    tables = figure_tables(sorted(found, key=lambda figure: natural(figure.name)), drop)
    return "\n\n".join(tables) + "\n" if tables else ""
