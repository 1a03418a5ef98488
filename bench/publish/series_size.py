"""How large the patch series of each SGLang version is: what a port to the next version has to carry over."""

from __future__ import annotations

import re
from pathlib import Path

from bench.harness.environment import now, provenance
from bench.publish.summary import Figure
from sglang_eplb_affinity.patching.series import read_series


def size_of(folder: Path) -> tuple[int, int]:
    """(hunks, lines added or removed) of the series in ``folder``."""
    diffs = [patch.diff for patch in read_series(folder)]
    hunks = sum(len(re.findall(r"^@@ ", diff, re.M)) for diff in diffs)
    changed = sum(len(re.findall(r"^(?:[+](?![+][+] )|-(?!-- ))", diff, re.M)) for diff in diffs)
    return hunks, changed


def figures_of_series(patches: Path) -> list[Figure]:
    """``port.VERSION.hunks`` and ``port.VERSION.changed_lines`` of each folder of ``patches``."""
    about = provenance()
    found = []
    for folder in sorted(path.parent for path in patches.glob("*/series")):
        name = folder.name.replace(".", "_")
        for what, value in zip(("hunks", "changed_lines"), size_of(folder), strict=True):
            unit = what.replace("_", " ")
            found.append(
                Figure(
                    name=f"port.{name}.{what}", value=value, lower=value, upper=value, unit=unit, kind="measured",
                    hardware=about["hardware"], versions=about["versions"], commit=about["commit"], date=now(),
                    command="python -m bench summary from-series --output FILE",
                )
            )  # fmt: skip
    return found
