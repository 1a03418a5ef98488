"""The command line that the micro benchmarks share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bench.harness.output_paths import result_file


def out_and_repeats(
    program: str, text: str | None, repeats: int, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """--out and --repeats; a line and exit code 2 for fewer than two, which have no spread. ``text``: a docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=(text or "").split("\n")[0])
    parser.add_argument("--out", type=result_file, required=True)
    parser.add_argument("--repeats", type=int, default=repeats)
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        print(f"error: --repeats {options.repeats}: at least 2 are needed for a spread", file=sys.stderr)
        raise SystemExit(2)
    return options
