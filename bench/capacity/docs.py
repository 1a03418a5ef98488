"""Put the tables into docs/capacity_results.md, between markers, so that the page always shows the last run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.domain.files import write_atomically

_MARKER = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_COLUMNS = (
    "GPUs", "phase", "algorithm", "dispatch + experts + combine + rest, us", "slowest in dispatch", "step ms",
    "tokens/s/GPU", "gain over EPLB", "GPU / node fan-out", "load", "active slots",
)  # fmt: skip


def compact_table(data: dict[str, Any]) -> str:
    """Markdown of one `simulate` result; intervals as [5 %, 95 %] of the resampled batches."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    for r in data["results"]:
        stages = " + ".join(f"{r[f'{s}_us']['value']:.0f}" for s in ("dispatch", "experts", "combine", "rest"))
        step, gain = r["step_ms"], r.get("gain_pct_over_eplb")
        cells = (
            str(r["gpus"]), f"{r['phase']}, {r['mode'].replace('_', ' ')}, {r['tokens_per_gpu']} tokens/GPU",
            f"{r['algorithm']} +{r['redundant']}, {r['dispatch_rule']}", stages, r["slowest"]["dispatch"],
            f"{step['value']:.1f} [{step['lower']:.1f}, {step['upper']:.1f}]", f"{r['tokens_per_second_per_gpu']:.0f}",
            "" if gain is None else f"{gain['value']:+.1f} % [{gain['lower']:+.1f}, {gain['upper']:+.1f}]",
            f"{r['gpu_fanout']:.2f} / {r['node_fanout']:.2f}", f"{r['load_max_over_mean']:.2f}",
            f"{r['active_slots']:.1f}" if "active_slots" in r else "",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gains_table(folder: Path) -> str:
    """Markdown: the gain over EPLB of each preset and size of ``folder``, a column for each phase and DeepEP mode."""
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text())
        for r in data.get("results", ()) if "system" in data else ():
            gain = r.get("gain_pct_over_eplb") if r["algorithm"] == "affinity" else None
            if gain is not None:
                cell = f"{gain['value']:+.1f} % [{gain['lower']:+.1f}, {gain['upper']:+.1f}]"
                title = f"{r['phase']}, {r['mode'].replace('_', ' ')}"
                if r["mode"] == "low_latency" and r["dispatch_rule"] != "static":
                    title += ", `primary`"  # which follows another rule in large passes
                    cell += "" if r["dispatch_rule"] == "primary" else f" (as `{r['dispatch_rule']}`)"
                rows.setdefault((file.stem, r["gpus"]), {})[title] = f"{cell}, +{r['redundant']}"
    if not rows:
        raise InputError(f"docs: no simulated results in {folder.name}; run `python -m bench.capacity all`")
    columns = list(dict.fromkeys(title for cells in rows.values() for title in cells))
    lines = ["| cluster | GPUs | " + " | ".join(columns) + " |", "|---|---:|" + "---|" * len(columns)]
    for (name, gpus), cells in sorted(rows.items()):
        values = " | ".join(cells.get(column, "") for column in columns)
        lines.append(f"| [{name}](../results/simulate/{name}.md) | {gpus} | {values} |")
    return "\n".join(lines)


def table_named(name: str, folder: Path) -> str:
    """A result of ``folder`` as Markdown: `gains` of all, NAME.json of `simulate`, else NAME.md or NAME.txt."""
    if name == "gains":
        return gains_table(folder)
    path = folder / f"{name}.json"
    if path.is_file() and not name.startswith("day-"):
        return compact_table(json.loads(path.read_text()))
    for suffix in (".md", ".txt"):
        path = folder / f"{name}{suffix}"
        if path.is_file():
            text = path.read_text().strip()
            if suffix == ".txt":
                return f"```\n{text}\n```"
            return "\n".join(line for line in text.splitlines() if line.startswith("|"))
    raise InputError(f"docs: no result named {name!r} in {folder.name}; run `python -m bench.capacity all`")


def filled(text: str, folder: Path) -> str:
    """``text`` with what is between ``<!-- table: NAME -->`` and ``<!-- end -->`` made anew from ``folder``."""
    return _MARKER.sub(
        lambda found: f"{found.group(1)}{table_named(found.group('name'), folder)}\n{found.group(3)}", text
    )


def fill(page: Path, folder: Path) -> None:
    """The same, written to ``page``."""
    write_atomically(page, filled(page.read_text(), folder).encode())
