"""``python -m sglang_eplb_affinity.patching apply|unapply|verify|refresh|status [--patches DIR] [--topic NAME]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sglang_eplb_affinity.domain.errors import InputError
from sglang_eplb_affinity.patching import actions
from sglang_eplb_affinity.patching.upstream import Installation, series_folder

DEFAULT_PATCHES = Path(__file__).resolve().parents[2] / "patches"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_eplb_affinity.patching", description=__doc__)
    parser.add_argument("action", choices=["apply", "unapply", "verify", "refresh", "status"])
    parser.add_argument("--patches", type=Path, default=DEFAULT_PATCHES, help="folder with a series for each SGLang")
    parser.add_argument("--topic", help="refresh: the patch that takes edits made to the installed files")
    parser.add_argument("--wheel", type=Path, help="refresh: SGLang's wheel, when a further file was edited")
    options = parser.parse_args(argv)
    try:
        installation = Installation.find()
        project = actions.Project(series_folder(options.patches, installation.version), installation)
        if options.action == "refresh":
            print(actions.refresh(project, options.topic, options.wheel))
        else:
            print(getattr(actions, options.action)(project))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
