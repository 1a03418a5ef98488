"""Progress of a run on the terminal: a bar over all requests, and a line for each finished cell."""

from __future__ import annotations

import sys

from tqdm import tqdm

from bench.harness.runner import Progress
from bench.harness.schedule import CellKey
from bench.harness.store import CellRecord


class ConsoleProgress(Progress):
    """The bar needs a terminal; anywhere else (a log file, CI) there are only lines."""

    def __init__(self, total_requests: int, done_requests: int) -> None:
        self._bar = tqdm(
            total=total_requests,
            initial=done_requests,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} requests [{elapsed}<{remaining}] {desc}",
            file=sys.stderr,
            disable=None,
            dynamic_ncols=True,
        )
        self._done_before = done_requests

    def say(self, line: str) -> None:
        if self._bar.disable:
            self._line(line)
        else:
            self._bar.set_description_str(line)

    def request(self, cell: CellKey, done: int, total: int) -> None:
        if not self._bar.disable:
            self._bar.n = self._done_before + min(done, total)
            self._bar.set_description_str(f"{cell.name} {done}/{total}")

    def cell(self, record: CellRecord) -> None:
        self._done_before += record.requests
        self._line(describe(record))
        if not self._bar.disable:
            self._bar.n = self._done_before
            self._bar.refresh()

    def _line(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def describe(record: CellRecord) -> str:
    """One line about a finished cell."""
    if record.void:
        return f"{record.key.name}: VOID ({'; '.join(record.void)})"
    m, p = record.metrics, record.placement
    if record.key.load:
        shown = {"full prefill pass": "full_prefill_ms", "decode step": "decode_step_ms", "P90-TPOT": "p90_tpot_ms"}
        figures = [f"{title} {m[name]:.2f} ms" for title, name in shown.items() if name in m]
        return f"{record.key.name}: {', '.join(figures)}"
    moved = "unknown" if p["rebalances_moved"] is None else p["rebalances_moved"]
    return (
        f"{record.key.name}: P50-TTFT {m['p50_ttft_ms']:.0f} ms, P90-TPOT {m['p90_tpot_ms']:.1f} ms, "
        f"P95-ITL {m['p95_itl_ms']:.1f} ms, {m['qps']:.2f} requests/s, "
        f"{p['rebalances']} rebalances ({moved} moved experts), "
        f"cores used by others {m.get('other_cores', float('nan')):.1f}"
    )
