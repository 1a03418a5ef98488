"""Several loads of sglang.bench_serving one after another in one process, which imports SGLang once.

    python -m bench.gpu.serving_loop COMMANDS.json

COMMANDS.json is a list of argument lists of `python -m sglang.bench_serving`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from sglang.benchmark.serving import cli_main

    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv = ["bench_serving", *arguments]
        cli_main()


if __name__ == "__main__":
    main()
