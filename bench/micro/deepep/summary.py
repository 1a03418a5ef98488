"""Summary entries of a DeepEP measurement.

    python -m bench.micro.deepep.summary results/deepep/h200-x2.json --out entries.json

`--ep-forced-routing balanced:local` sends every token to one GPU, `balanced:spread` to as many as it has experts; both
load all GPUs equally. These are the routings `spread` (fan-out 1) and N (fan-out N) of this benchmark, so their ratio
is what fan-out costs a dispatch at the same balance.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.harness.output_paths import result_file
from bench.publish.summary import Figure, dump_figures, of_ranks
from sglang_eplb_affinity.domain.errors import InputError

HIDDEN, DTYPE, TOKENS = 4096, "bf16", 8192


def local_to_spread(result: dict[str, Any]) -> Figure:
    """Dispatch time at fan-out 1 over that at the largest fan-out; the interval spans the repeats' extremes."""
    gpus = result["settings"]["gpus"]
    times = {
        row["routing"]: row["dispatch_us"]
        for row in result["sections"]["normal"]["rows"]
        if (row["hidden"], row["dtype"], row["tokens"]) == (HIDDEN, DTYPE, TOKENS)
    }
    missing = {"spread", str(gpus)} - set(times)
    if missing:
        raise InputError(f"no row of routing {sorted(missing)[0]} at hidden {HIDDEN}, {DTYPE}, {TOKENS} tokens")
    local, spread = times["spread"], times[str(gpus)]
    return Figure(
        name=f"{of_ranks(gpus)}forced.fanout.dispatch_ratio_local_to_spread",
        value=round(local["median"] / spread["median"], 4),
        lower=round(local["repeat_min"] / spread["repeat_max"], 4),
        upper=round(local["repeat_max"] / spread["repeat_min"], 4),
        unit=f"of the dispatch time at fan-out {gpus} (normal mode, {TOKENS} tokens a GPU, {DTYPE})",
        kind="measured",
        hardware=result["hardware"],
        versions=result["versions"],
        commit=result["commit"],
        date=result["date"],
        command=result["command"],
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro.deepep.summary", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--out", type=result_file, required=True)
    options = parser.parse_args()
    try:
        dump_figures([local_to_spread(json.loads(options.result.read_text()))], options.out)
    except (OSError, ValueError, KeyError, InputError) as error:
        print(f"error: {options.result}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
